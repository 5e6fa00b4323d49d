"""Our PyTorch code computes what our Decoder computes: every scheme, every kind of model."""

import jax
import numpy as np
import pytest
from covering import SCHEMES_WITH_EACH_PLACE, others_are_long
from exported_models import KINDS, SOME, as_leaves, compiled, config_of, draw, export, ids, in_torch, torch
from flax.traverse_util import flatten_dict

import hybridnorm_jax as hn
from hybridnorm_jax import equivalence

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)
PROMPT = 4
# Each kind of model is compared once by `make test`: these with gradients and a text, the others in float64.
IN_FLOAT32 = {*SCHEMES_WITH_EACH_PLACE, *SOME}
IN_FLOAT64 = {*KINDS, "hybrid_output_norm", "layernorm_scaling", "deepnorm"}


def largest(difference):
    return float(np.abs(difference).max())


@pytest.mark.parametrize("name", others_are_long([*hn.SCHEMES, *KINDS], IN_FLOAT32))
def test_float32_is_equal_up_to_rounding(tmp_path, name):
    """Logits, the loss, the gradient of every parameter, and text that is written with a cache."""
    config, params, directory = export(tmp_path / "model", config_of(name))
    model = in_torch(directory)
    (loss, logits), gradients = compiled(config)(params, TOKENS)

    theirs = model(ids(TOKENS), labels=ids(TOKENS))
    # Logits are of about 1, and a float32 has 6e-8 of that: 2e-5 is what some hundred roundings leave.
    assert largest(theirs.logits.detach().numpy() - logits) < 2e-5
    assert abs(float(theirs.loss.detach()) - float(loss)) < 1e-5 * float(loss)
    theirs.loss.backward()
    found = as_leaves(config, {name: each.grad for name, each in model.named_parameters()})
    gradients = flatten_dict(gradients, sep="/")
    for path, gradient in gradients.items():
        size = np.linalg.norm(gradient)
        if path.endswith(("norm/alpha", "norm/shift", "norm/lam")):
            # One number sums what the scale keeps apart, and may be near 0 where the terms are not.
            size = max(size, np.linalg.norm(gradients.get(f"{path.rpartition('/')[0]}/scale", 0)))
        assert np.linalg.norm(found[path] - gradient) <= 1e-4 * size, path
        assert size > 0 or "balance_bias" in path, path

    written = model.generate(ids(TOKENS[:, :PROMPT]), max_new_tokens=12 - PROMPT, do_sample=False).numpy()
    (_, logits), _ = compiled(config)(params, written.astype(np.int32))
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, PROMPT - 1 : -1], written[:, PROMPT:])


@pytest.mark.parametrize("name", others_are_long(sorted(IN_FLOAT64), IN_FLOAT64 - IN_FLOAT32))
def test_float64_is_equal(tmp_path, name):
    """No approximation hides behind the rounding of float32."""
    with jax.enable_x64(True):
        config, params, directory = export(tmp_path / "model", config_of(name, dtype="float64", param_dtype="float64"))
        logits = jax.jit(hn.Decoder(config).apply)({"params": params}, TOKENS)
    model = in_torch(directory)
    assert model.dtype == torch.float64
    with torch.no_grad():
        assert largest(model(ids(TOKENS)).logits.numpy() - np.asarray(logits)) < 1e-12


@pytest.mark.parametrize("form", [equivalence.to_pre_rmsnorm, equivalence.to_pre_crmsnorm])
def test_both_equivalent_forms_are_equal_to_the_original_in_torch_too(tmp_path, form):
    config = config_of("layernorm", scheme="pre", num_layers=2)
    params = draw(config)
    original = in_torch(export(tmp_path / "original", config, params).directory)
    converted = in_torch(export(tmp_path / "converted", *form(config, params)).directory)
    assert converted.config.norm != original.config.norm
    with torch.no_grad():
        difference = largest((converted(ids(TOKENS)).logits - original(ids(TOKENS)).logits).numpy())
    assert difference < 2e-5


def test_bfloat16_is_near(tmp_path):
    """Both compute in bfloat16; each rounds in other places, so only the size of the difference is known."""
    config, params, directory = export(tmp_path / "model", config_of("hybrid_star", dtype="bfloat16"))
    exact = jax.jit(hn.Decoder(config_of("hybrid_star")).apply)({"params": params}, TOKENS)
    ours = jax.jit(hn.Decoder(config).apply)({"params": params}, TOKENS)
    with torch.no_grad():
        theirs = in_torch(directory, dtype=torch.bfloat16)(ids(TOKENS)).logits
    assert theirs.dtype == torch.bfloat16
    error = np.linalg.norm(theirs.float().numpy() - exact)
    assert error < 2 * np.linalg.norm(np.asarray(ours) - exact)
    assert error < 0.03 * np.linalg.norm(exact)
