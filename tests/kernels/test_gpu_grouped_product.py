"""The grouped product for GPUs is what its formula says: its kernels run here in Pallas' interpreter."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.kernels import gpu_grouped_product as gpu
from hybridnorm_jax.kernels.expert_dispatch import apply_grouped_experts
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from tests.kernels.test_expert_dispatch import assert_equal_to, by_dispatch, choose, draw, value_and_gradients

SIZES = [(3, 0, 9, 1), (0, 0, 0, 0), (0, 40, 0, 0), (16, 16, 8, 0), (5, 0, 0, 35), (17, 15, 1, 7)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(gpu.pl, "pallas_call", functools.partial(gpu.pl.pallas_call, interpret=True))


def textbook(rows, kernels, sizes):
    """Expert by expert, and zero past the last group."""
    ends = np.cumsum(sizes)
    pieces = [rows[end - size : end] @ kernel for size, end, kernel in zip(sizes, ends, kernels, strict=True)]
    return jnp.concatenate([*pieces, jnp.zeros((len(rows) - ends[-1], kernels.shape[2]), rows.dtype)])


@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_each_experts_product_in_value_and_gradient_whatever_lies_past_the_last_group(sizes):
    used, rng = sum(sizes), np.random.default_rng(0)
    with jax.enable_x64(True):
        rows, kernels, d_out = (jnp.asarray(rng.standard_normal(s)) for s in ((40, 24), (4, 24, 36), (40, 36)))
        expected, pull = jax.vjp(lambda rows, kernels: textbook(rows, kernels, sizes), rows, kernels)
        d_rows, d_kernels = pull(d_out)
        poisoned, d_poisoned = (array.at[used:].set(jnp.nan) for array in (rows, d_out))
        product = functools.partial(gpu.gpu_grouped_product, sizes=jnp.asarray(sizes, jnp.int32))
        got, pull = jax.vjp(product, poisoned, kernels)
        got_rows, got_kernels = pull(d_poisoned)
    of_groups = (expected[:used], d_rows[:used], d_kernels)
    assert_equal_to(of_groups, (got[:used], got_rows[:used], got_kernels), 1e-12)


@pytest.mark.parametrize("routing", [np.zeros(6), np.array([0, 0, 9, 0.3, -9, 0.1])])
def test_experts_by_it_are_dense_ones(routing):
    chosen = choose(70, 6, 2, scores=routing)
    with jax.enable_x64(True):
        inputs = draw(70, 6, 2, np.float32)
        expected = value_and_gradients(by_dispatch("dense", chosen), *(array.astype(np.float64) for array in inputs))
    got = value_and_gradients(by_dispatch("grouped", chosen.astype(np.int32)), *inputs)
    assert_equal_to(expected, got, 2e-6)


# As many roundings of 4e-3 as there are in test_expert_dispatch, in float16 of 5e-4.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 2.5e-3)])
def test_narrow_dtypes_stay_within_their_rounding(dtype, tolerance):
    chosen = choose(70, 6, 2, scores=np.array([0, 0, 2, 0.3, -2, 0.1]))
    with jax.enable_x64(True):
        rounded = draw(70, 6, 2, dtype)
        expected = value_and_gradients(by_dispatch("dense", chosen), *(array.astype(np.float64) for array in rounded))
    got = value_and_gradients(by_dispatch("grouped", chosen.astype(np.int32)), *rounded)
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    assert_equal_to(expected, got, tolerance)


def test_rows_past_the_last_group_are_zero_in_the_experts_result():
    *arrays, _ = draw(20, 4, 1, np.float32)
    rows = arrays[0].at[13:].set(jnp.nan)
    sizes = jnp.asarray([3, 0, 9, 1])
    made = apply_grouped_experts(rows, jnp.ones(20), sizes, ExpertKernels(*arrays[1:]), dispatch="grouped")
    assert np.isfinite(made).all()
    assert not np.asarray(made[13:]).any()


@pytest.mark.parametrize("sizes", SIZES)
def test_each_row_of_a_group_is_visited_once(sizes):
    visits = gpu._visits(jnp.asarray(sizes), 48, 16)
    found = []
    for tile, expert, start, end in zip(*map(np.asarray, visits), strict=True):
        found += [(row, expert) for row in range(max(start, 16 * tile), min(end, 16 * tile + 16))]
    assert found == list(enumerate(np.repeat(np.arange(4), sizes)))


# ---- XLA's compiler for GPUs works without a GPU.

COMPILED = """
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from hybridnorm_jax.kernels.gpu_grouped_product import gpu_grouped_product
from hybridnorm_jax.planning.collectives import kernels
from hybridnorm_jax.planning.gpu_devices import gpu_devices
from hybridnorm_jax.planning.matrix_products import matrix_products

here = jax.sharding.SingleDeviceSharding(gpu_devices("h100", 1, 1, "test")[0])

def shape(*sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

def loss(rows, of_experts, sizes):
    return jnp.square(gpu_grouped_product(rows, of_experts, sizes).astype(jnp.float32)).sum()

for dtype, embed, mlp in [("bfloat16", 256, 384), ("float32", 96, 80), ("float16", 100, 100)]:
    inputs = shape(2048, embed, dtype=dtype), shape(8, embed, mlp, dtype=dtype), shape(8, dtype=jnp.int32)
    text = jax.jit(jax.grad(loss, (0, 1)), out_shardings=here).lower(*inputs).compile().as_text()
    print(*kernels(text), *[each.flops for each in matrix_products(text)])
"""


def test_the_compiler_for_h100_takes_it_and_its_flops_are_counted():
    pytest.importorskip("jax_plugins.xla_cuda13")
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["grouped_kernel_gradient", "grouped_product"]] * 3
    flops = 2 * 2048 * 256 * 384
    assert lines[0].split()[2:] == [str(flops)] * 3
