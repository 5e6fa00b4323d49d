"""Flash attention for GPUs is what its formula says: its kernels run here in Pallas' interpreter."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType

from hybridnorm_jax.kernels import gpu_flash
from hybridnorm_jax.kernels.attention_arrays import AttentionInputs
from hybridnorm_jax.kernels.backend_names import SAVED
from hybridnorm_jax.kernels.flash_tiles import AttentionTiles, Tiles, visited_pairs
from hybridnorm_jax.mesh.device_mesh import use_mesh
from tests.kernels.test_attention_backends import (
    ROUNDED_WEIGHTS,
    as_written,
    assert_equal_to,
    context_and_gradients,
    documents,
    draw,
    many_far_keys,
    textbook,
    with_gradients,
)

# Small ones, of unequal sides, so that a sequence of 100 has many.
SMALL = AttentionTiles(Tiles(32, 16, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 2))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(gpu_flash.pl, "pallas_call", functools.partial(gpu_flash.pl.pallas_call, interpret=True))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(gpu_flash, "attention_tiles", lambda *_: SMALL)


def flash(query, key, value, segment_ids=None, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return gpu_flash.flash_attention(AttentionInputs(query, key, value, segment_ids), scale=scale, saved_as=SAVED)


@pytest.mark.parametrize(
    ("seq", "kv_heads", "head_dim", "segmented"),
    [(1, 4, 16, False), pytest.param(64, 2, 16, False, marks=pytest.mark.long), (100, 1, 24, True), (96, 4, 8, True)],
)
@pytest.mark.usefixtures("small_tiles")
def test_flash_is_softmax_attention_in_value_and_gradient(seq, kv_heads, head_dim, segmented):
    segment_ids = documents(2, seq) if segmented else None
    with jax.enable_x64(True):
        inputs = draw(2, seq, 4, kv_heads, head_dim, np.float64)
        expected = context_and_gradients(functools.partial(textbook, segment_ids=segment_ids), *inputs)
        got = context_and_gradients(functools.partial(flash, segment_ids=segment_ids), *inputs)
    assert_equal_to(expected, got, 1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_another_scale_of_the_scores_is_that_of_longer_queries():
    with jax.enable_x64(True):
        query, *rest = draw(2, 70, 4, 2, 16, np.float64)
        factor = 0.7 * 16**0.5
        expected = context_and_gradients(lambda q, k, v: textbook(factor * q, k, v), query, *rest)
        got = context_and_gradients(functools.partial(flash, scale=0.7), query, *rest)
    assert_equal_to(expected, got, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(jnp.float32, 2e-6, marks=pytest.mark.long),  # the tests of meshes are in float32, too
        (jnp.bfloat16, 2e-2),
        pytest.param(jnp.float16, 2e-3, marks=pytest.mark.long),
    ],
)
def test_narrow_dtypes_stay_within_their_rounding(dtype, tolerance):
    with jax.enable_x64(True):
        rounded = draw(1, 200, 4, 2, 16, dtype)
        expected = context_and_gradients(textbook, *(x.astype(np.float64) for x in rounded))
        got = context_and_gradients(flash, *rounded)
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    assert_equal_to(expected, got, tolerance)


def test_the_softmax_of_bfloat16_is_computed_in_float32():
    query, key, value, expected = many_far_keys()
    last = np.asarray(as_written(flash)(query, key, value)[0, -1], np.float64)
    np.testing.assert_allclose(last, expected, rtol=2.0**-9, atol=ROUNDED_WEIGHTS)


def test_scores_far_beyond_the_range_of_exp_do_no_harm():
    query, key, value, d_context = draw(1, 70, 2, 2, 8)
    for array in context_and_gradients(flash, 1e4 * query, key, value, d_context):
        assert np.isfinite(array).all()


@pytest.mark.usefixtures("small_tiles")
def test_tiles_beyond_the_diagonal_are_not_visited():
    # A NaN in a tile that is visited would reach every query of it, because 0 * NaN is NaN.
    query, key, value, d_context = draw(1, 96, 1, 1, 16)
    poisoned = value.at[:, 64:].set(jnp.nan)
    both = with_gradients(flash)
    context, d_query, _, _ = both(query, key, poisoned, d_context)
    assert np.isfinite(context[:, :64]).all()
    assert np.isfinite(d_query[:, :64]).all()
    # And no key is visited by the queries before it.
    d_context = d_context.at[:, :32].set(jnp.nan)
    _, _, d_key, d_value = both(query, key, value, d_context)
    assert np.isfinite(d_key[:, 32:]).all()
    assert np.isfinite(d_value[:, 32:]).all()


@pytest.mark.usefixtures("small_tiles")
def test_tiles_of_other_segments_are_not_visited():
    query, key, value, d_context = draw(1, 128, 1, 1, 16)
    segment_ids = jnp.asarray(np.arange(128) >= 64, jnp.int32)[None]
    both = with_gradients(functools.partial(flash, segment_ids=segment_ids))
    first = value.at[:, :64].set(jnp.nan)
    context, d_query, _, _ = both(query, key, first, d_context)
    assert np.isfinite(context[:, 64:]).all()
    assert np.isfinite(d_query[:, 64:]).all()
    second = d_context.at[:, 64:].set(jnp.nan)
    _, _, d_key, d_value = both(query, key, value, second)
    assert np.isfinite(d_key[:, :64]).all()
    assert np.isfinite(d_value[:, :64]).all()


def test_segments_need_not_be_in_order():
    segment_ids = jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, 70)))
    inputs = draw(2, 70, 2, 1, 16)
    expected = context_and_gradients(functools.partial(textbook, segment_ids=segment_ids), *inputs)
    got = context_and_gradients(functools.partial(flash, segment_ids=segment_ids), *inputs)
    assert_equal_to(expected, got, 2e-6)


def test_a_policy_that_saves_its_name_keeps_context_and_denominators():
    query, key, value, _ = draw(1, 64, 2, 2, 16)
    policy = checkpoint_policies.save_only_these_names(SAVED)
    pull = jax.vjp(jax.checkpoint(flash, policy=policy), query, key, value)[1]
    sizes = sorted(array.size for array in jax.tree.leaves(pull))
    assert sizes == [2 * 64, *[query.size] * 4]  # log_total; query, key, value and context


MESHES = {("data", "fsdp", "tensor"): (2, 2, 2), ("data", "context"): (2, 4)}


@pytest.mark.parametrize(("names", "segmented"), diagonal(MESHES, [True, False], apart=2))
def test_on_a_mesh_it_is_the_same(names, segmented):
    inputs, ids = draw(4, 80, 4, 1, 8), documents(4, 80) if segmented else None
    expected = context_and_gradients(functools.partial(textbook, segment_ids=ids), *inputs)
    with use_mesh(jax.make_mesh(MESHES[names], names, axis_types=(AxisType.Auto,) * len(names))):
        got = context_and_gradients(functools.partial(flash, segment_ids=ids), *inputs)
    assert_equal_to(expected, got, 5e-6)


def test_visited_pairs_are_those_of_the_tiles_up_to_the_diagonal():
    tiles = Tiles(rows=32, columns=16, warps=4, stages=1)
    seen = [(row, column) for row in range(3) for column in range(6) if 16 * column <= 32 * row + 31]
    assert visited_pairs(96, 96, tiles) == len(seen) * 32 * 16
    assert visited_pairs(32, 96, tiles) == 32 * 96 // 2  # a stretch of a split sequence


# ---- XLA's compiler for GPUs works without a GPU.

COMPILED = """
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from hybridnorm_jax.kernels.attention_backends import softmax_attention
from hybridnorm_jax.kernels.backend_names import SAVED
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.planning.collectives import kernels
from hybridnorm_jax.planning.gpu_devices import gpu_devices
from hybridnorm_jax.planning.matrix_products import matrix_products

mesh = make_mesh({"data": 1}, gpu_devices("h100", 1, 1, "test"))
jax.set_mesh(mesh)  # from which JAX 0.12 knows what it compiles for
here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

def shape(*sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

def loss(query, key, value, ids):
    return softmax_attention(query, key, value, segment_ids=ids, backend="flash").astype(jnp.float32).sum()

for dtype, head_dim, segmented in [("bfloat16", 64, True), ("bfloat16", 96, False), ("float32", 256, True)]:
    query, key = shape(1, 512, 4, head_dim, dtype=dtype), shape(1, 512, 2, head_dim, dtype=dtype)
    ids = shape(1, 512, dtype=jnp.int32) if segmented else None
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=here)
    text = gradient.lower(query, key, key, ids).compile().as_text()
    print(*kernels(text), *sorted(each.flops for each in matrix_products(text)))

saving = jax.checkpoint_policies.save_only_these_names(SAVED)
gradient = jax.jit(jax.grad(jax.checkpoint(loss, policy=saving), (0, 1, 2)), out_shardings=here)
print(gradient.lower(query, key, key, ids).compile().as_text().count('name = "flash_forward"'))
"""


def test_the_compiler_for_h100_takes_it_and_its_flops_are_counted():
    pytest.importorskip("jax_plugins.xla_cuda13")
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, forward_with_saved = done.stdout.splitlines()
    assert forward_with_saved == "1"  # and not once more in the backward pass
    names = "flash_d_key_value flash_d_query flash_forward"
    assert [line[: len(names)] for line in lines] == [names] * 3
    # 2 products forward, 3 and 4 backward; tiles of 128 x 64 visit 2, 4, 6 and 8 of 8 columns.
    per_product = 2 * 4 * 64 * (2 + 4 + 6 + 8) * 128 * 64
    assert lines[0] == f"{names} {2 * per_product} {3 * per_product} {4 * per_product}"
