"""What tests that take every scheme of the table ask for."""

import hybridnorm_jax as hn

# Of the 1,000 updates after which all branches are whole: deep layers have not grown up yet, and the first has.
STEP = 400


def keys_of(scheme):
    """Keys of ModelConfig with this scheme; where its branches grow with the training step, at STEP."""
    growing = hn.SCHEMES[scheme].block(0, 1).grows
    return {"scheme": scheme} | ({"ramp_at": STEP} if growing else {})


def stored_scale(path, config):
    """Where the parameter `scale` at a path counts as 1: at 1, and at 1 / sqrt(d_model) where nGPT stores it so."""
    is_stored = config.scheme_rule.sphere and path[-2].key not in ("gate_scale", "up_scale")
    return config.d_model**-0.5 if is_stored else 1.0
