"""What the loss reads of logits, in one pass on a GPU and in several elsewhere, is what SciPy and NumPy say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.kernels import token_logits as module
from hybridnorm_jax.kernels.token_logits import token_logits


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_values_and_gradients(monkeypatch, platform, size):
    monkeypatch.setattr(module, "traced_platform", lambda: platform)
    rng = np.random.default_rng(0)
    logits, targets = size * rng.standard_normal((2, 5, 67)), rng.integers(0, 67, (2, 5))
    gradient = module.TokenLogits(*rng.standard_normal((2, 2, 5)))
    highest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - highest)
    log_z = (highest + np.log(weights.sum(-1, keepdims=True)))[..., 0]
    softmax = weights / weights.sum(-1, keepdims=True)
    one_hot = np.eye(67)[targets]
    with jax.enable_x64(True):
        found, pull = jax.vjp(lambda logits: token_logits(logits, jnp.asarray(targets)), jnp.asarray(logits))
        (d_logits,) = pull(module.TokenLogits(*map(jnp.asarray, gradient)))
    np.testing.assert_allclose(found.log_z, log_z, rtol=1e-14)
    np.testing.assert_array_equal(found.chosen, np.take_along_axis(logits, targets[..., None], -1)[..., 0])
    expected = gradient.log_z[..., None] * softmax + gradient.chosen[..., None] * one_hot
    np.testing.assert_allclose(d_logits, expected, rtol=1e-10, atol=1e-14)
