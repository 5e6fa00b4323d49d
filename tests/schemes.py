"""What tests that take every scheme of the table ask for."""

import hybridnorm_jax as hn

# Of the 1,000 updates after which all branches are whole: deep layers have not grown up yet, and the first has.
STEP = 400


def keys_of(scheme):
    """Keys of ModelConfig with this scheme; where its branches grow with the training step, at STEP."""
    growing = hn.SCHEMES[scheme].block(0, 1).grows
    return {"scheme": scheme} | ({"ramp_at": STEP} if growing else {})
