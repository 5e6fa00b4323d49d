"""Attention to kept keys and values against a plain softmax in NumPy, float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.kernels.cached_attention import attend_at_once, attend_in_blocks, cached_attention

BATCH, KV_HEADS, GROUP, WIDTH = 3, 2, 2, 4
SLOTS = 61


def _plain(query, key, value, first, last):
    out = np.zeros(query.shape)
    for row, start in enumerate(first):
        for head in range(KV_HEADS * GROUP):
            keys = key[row, head // GROUP, :, start : last + 1]
            scores = query[row, 0, head] @ keys / np.sqrt(WIDTH)
            weights = np.exp(scores - scores.max())
            out[row, 0, head] = value[row, head // GROUP, :, start : last + 1] @ weights / weights.sum()
    return out


@pytest.fixture(scope="module")
def arrays():
    """Query, keys and values; some scores are far above the others, so the highest one moves from block to block."""
    rng = np.random.default_rng(0)
    query = rng.normal(0, 3, (BATCH, 1, KV_HEADS * GROUP, WIDTH))
    key, value = rng.normal(0, 3, (2, BATCH, KV_HEADS, WIDTH, SLOTS))
    return query, key, value


@pytest.mark.parametrize("blocks", [None, 1, 2, 5, 8])
def test_any_number_of_blocks_is_the_plain_softmax_over_the_slots_of_each_row(blocks, arrays):
    """61 slots are no multiple of any: the last block begins earlier, and does not count what it repeats."""
    attend = attend_at_once if blocks is None else partial(attend_in_blocks, blocks=blocks)
    with jax.enable_x64(True):
        compiled = jax.jit(lambda *rest: attend(*map(jnp.asarray, arrays), *rest))
        for first, last in [([0, 0, 0], 0), ([0, 7, 30], 30), ([13, 5, 60], 60), ([40, 39, 41], 47)]:
            ours = compiled(jnp.asarray(first), jnp.asarray(last))
            np.testing.assert_allclose(ours, _plain(*arrays, first, last), rtol=1e-12, atol=1e-12)


def test_this_platform_takes_one_of_them(arrays):
    with jax.enable_x64(True):
        ours = cached_attention(*map(jnp.asarray, arrays), first=jnp.asarray([2, 0, 9]), last=jnp.asarray(50))
    np.testing.assert_allclose(ours, _plain(*arrays, [2, 0, 9], 50), rtol=1e-12, atol=1e-12)


def test_a_gpu_reads_all_slots_at_once_and_loops_over_nothing():
    shapes = [jax.ShapeDtypeStruct((BATCH, KV_HEADS, WIDTH, 4096), jnp.float32)] * 2
    query = jax.ShapeDtypeStruct((BATCH, 1, KV_HEADS * GROUP, WIDTH), jnp.float32)
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    first = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    traced = jax.jit(cached_attention).trace(query, *shapes, first=first, last=whole)
    assert "while" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
