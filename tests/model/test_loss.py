"""Cross-entropy: what it is, and that chunks change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.kernels.token_logits import token_logits
from hybridnorm_jax.model.loss import chunked_cross_entropy, cross_entropy

RNG = np.random.default_rng(0)
HIDDEN, KERNEL = RNG.normal(size=(2, 12, 8)), RNG.normal(size=(8, 31))
TARGETS, WEIGHTS = RNG.integers(0, 31, (2, 12)), RNG.integers(0, 2, (2, 12)).astype(float)


def times(kernel, hidden, targets):
    return token_logits(hidden @ kernel, targets)


def test_definition():
    logits = HIDDEN @ KERNEL
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    with jax.enable_x64(True):
        sums = cross_entropy(token_logits(jnp.asarray(logits), jnp.asarray(TARGETS)), jnp.asarray(WEIGHTS))
    np.testing.assert_allclose(sums.nll, (WEIGHTS * nll).sum(), rtol=1e-13)
    np.testing.assert_allclose(sums.z, (WEIGHTS * log_z**2).sum(), rtol=1e-13)
    assert float(sums.weight) == WEIGHTS.sum()


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_z_loss_adds_its_own_gradient(chunk):
    """d/dl_v of log(Z)^2 is 2 log(Z) p_v: with the gradient p - onehot of -log p, times the targets' weights."""
    logits = HIDDEN @ KERNEL
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(logits - log_z)
    onehot = np.eye(31)[TARGETS]
    expected = WEIGHTS[..., None] * (p - onehot + 0.25 * 2 * log_z * p)

    def total(logits):
        if chunk is None:
            sums = cross_entropy(token_logits(logits, jnp.asarray(TARGETS)), jnp.asarray(WEIGHTS))
            return sums.nll + 0.25 * sums.z
        head = jnp.eye(31, dtype=logits.dtype)
        return chunked_cross_entropy(times, head, logits, TARGETS, WEIGHTS, chunk=chunk, z_loss=0.25)[0]

    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(total)(jnp.asarray(logits)), expected, rtol=1e-12, atol=1e-14)


def test_narrow_logits_have_a_loss_in_float32():
    logits = jnp.asarray(HIDDEN @ KERNEL, jnp.bfloat16)
    ours = cross_entropy(token_logits(logits, TARGETS), WEIGHTS)
    wide = cross_entropy(token_logits(logits.astype(jnp.float32), TARGETS), WEIGHTS)
    assert {field.dtype for field in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, ours, wide)


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_chunks_equal_the_whole_in_value_and_gradient(chunk):
    def whole(hidden, kernel):
        sums = cross_entropy(token_logits(hidden @ kernel, TARGETS), WEIGHTS)
        return sums.nll + 0.1 * sums.z, sums

    def chunked(hidden, kernel):
        return chunked_cross_entropy(times, kernel, hidden, TARGETS, WEIGHTS, chunk=chunk, z_loss=0.1)

    with jax.enable_x64(True):
        at = jnp.asarray(HIDDEN), jnp.asarray(KERNEL)
        expected = jax.value_and_grad(whole, (0, 1), has_aux=True)(*at)
        ours = jax.value_and_grad(chunked, (0, 1), has_aux=True)(*at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), ours, expected)


def test_chunks_never_hold_all_logits():
    """With room for one chunk's logits only, the compiled program must not need the whole batch's."""
    batch, seq, embed, vocab = 2, 256, 8, 4096
    hidden, kernel = jnp.ones((batch, seq, embed)), jnp.ones((embed, vocab))
    targets, weights = jnp.zeros((batch, seq), jnp.int32), jnp.ones((batch, seq))

    def temporaries(chunk):
        def loss(hidden, kernel):
            return chunked_cross_entropy(times, kernel, hidden, targets, weights, chunk=chunk)[0]

        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * batch * seq * vocab
    assert temporaries(seq) > all_logits
    assert temporaries(seq // 16) < all_logits / 4


def test_a_chunk_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="chunk=5"):
        chunked_cross_entropy(times, KERNEL, jnp.asarray(HIDDEN), TARGETS, WEIGHTS, chunk=5)
