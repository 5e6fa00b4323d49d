"""The experts for GPUs are what their formula says: their kernels run here in Pallas' interpreter."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.kernels import gpu_experts as experts_module
from hybridnorm_jax.kernels.expert_dispatch import apply_grouped_experts
from hybridnorm_jax.kernels.gpu_experts import gpu_experts
from hybridnorm_jax.kernels.segments import Segments, segments_of_groups
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from tests.kernels.test_expert_dispatch import assert_equal_to, by_dispatch, choose, draw, value_and_gradients

SIZES = [(3, 0, 9, 1), (0, 0, 0, 0), (0, 40, 0, 0), (16, 16, 8, 0), (5, 0, 0, 35), (17, 15, 1, 7)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    interpreted = functools.partial(experts_module.pl.pallas_call, interpret=True)
    monkeypatch.setattr(experts_module.pl, "pallas_call", interpreted)


def inputs(rows=40, embed=24, mlp=36, experts=4):
    """(rows, gate, up, down, row_weights, d_out) in float64."""
    rng = np.random.default_rng(0)
    shapes = [
        (rows, embed),
        (experts, embed, mlp),
        (experts, embed, mlp),
        (experts, mlp, embed),
        (rows,),
        (rows, embed),
    ]
    return [rng.standard_normal(shape) for shape in shapes]


def textbook(rows, gate, up, down, row_weights, expert):
    """Each row by its own copy of its expert's kernels; zero for the rows of no expert, whose number is -1."""
    gated, upped = (jnp.einsum("rd,rdm->rm", rows, kernel[expert]) for kernel in (gate, up))
    made = jnp.einsum("rm,rmd->rd", jax.nn.silu(gated) * upped, down[expert])
    return jnp.where((expert >= 0)[:, None], row_weights[:, None] * made, 0)


# Value and gradients of all arrays, compiled once for all segments of as many rows.


@jax.jit
def of_textbook(expert, arrays, d_out):
    value, pull = jax.vjp(functools.partial(textbook, expert=expert), *arrays)
    return value, *pull(d_out)


@jax.jit
def of_segments(segments, arrays, d_out):
    def ours(rows, gate, up, down, row_weights):
        return gpu_experts(rows, row_weights, segments, ExpertKernels(gate, up, down))

    value, pull = jax.vjp(ours, *arrays)
    return value, *pull(d_out)


def assert_rows_of_experts_are_right(segments, expert):
    """Value and gradients of gpu_experts against the textbook, with NaN in the rows of no expert."""
    of_some = expert >= 0
    with jax.enable_x64(True):
        *arrays, d_out = inputs(len(expert))
        value, *gradients = of_textbook(expert, arrays, d_out)
        hide = np.where(of_some[:, None], 0, np.nan)
        arrays[0], arrays[4] = arrays[0] + hide, arrays[4] + hide[:, 0]
        found = of_segments(segments, arrays, d_out + hide)
    value, *gradients, got, d_rows = map(np.asarray, (value, *gradients, *found[:2]))
    d_kernels, d_weights = found[2:5], np.asarray(found[5])
    expected_rows, *expected_kernels, expected_weights = gradients
    pairs = [(value, got), (expected_rows, d_rows), (expected_weights, d_weights)]
    for reference, array in pairs:
        assert_equal_to([reference[of_some]], [array[of_some]], 1e-12)
    assert_equal_to(expected_kernels, d_kernels, 1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_groups_of_rows_are_what_their_experts_make_of_them_in_value_and_gradient(sizes):
    expert = np.full(40, -1)
    expert[: sum(sizes)] = np.repeat(np.arange(4), sizes)
    assert_rows_of_experts_are_right(segments_of_groups(jnp.asarray(sizes)), expert)


def test_segments_may_leave_rows_between_them_and_an_expert_may_have_several():
    starts, ends, experts = [2, 9, 9, 20, 33], [9, 9, 18, 31, 36], [1, 3, 0, 1, 2]
    expert = np.full(40, -1)
    for start, end, number in zip(starts, ends, experts, strict=True):
        expert[start:end] = number
    assert_rows_of_experts_are_right(Segments(*(jnp.asarray(array) for array in (starts, ends, experts))), expert)


@pytest.mark.parametrize(
    "routing", [pytest.param(np.zeros(6), marks=pytest.mark.long), np.array([0, 0, 9, 0.3, -9, 0.1])]
)
def test_experts_by_it_are_dense_ones(routing):
    chosen = choose(70, 6, 2, scores=routing)
    with jax.enable_x64(True):
        inputs = draw(70, 6, 2, np.float32)
        expected = value_and_gradients(by_dispatch("dense", chosen), *(array.astype(np.float64) for array in inputs))
    got = value_and_gradients(by_dispatch("grouped", chosen.astype(np.int32)), *inputs)
    assert_equal_to(expected, got, 2e-6)


# As many roundings of 4e-3 as there are in test_expert_dispatch, in float16 of 5e-4.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), pytest.param(jnp.float16, 2.5e-3, marks=pytest.mark.long)]
)
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
    apply = jax.jit(functools.partial(apply_grouped_experts, dispatch="grouped"))
    made = apply(rows, jnp.ones(20), sizes, ExpertKernels(*arrays[1:]))
    assert np.isfinite(made).all()
    assert not np.asarray(made[13:]).any()


# ---- XLA's compiler for GPUs works without a GPU.

COMPILED = """
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from hybridnorm_jax.kernels.gpu_experts import gpu_experts
from hybridnorm_jax.kernels.segments import segments_of_groups
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.planning.collectives import kernels
from hybridnorm_jax.planning.gpu_devices import gpu_devices
from hybridnorm_jax.planning.matrix_products import matrix_products

mesh = make_mesh({"data": 1}, gpu_devices("h100", 1, 1, "test"))
jax.set_mesh(mesh)  # from which JAX 0.12 knows what it compiles for
here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

def shape(*sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

def loss(rows, weights, gate, up, down, sizes):
    made = gpu_experts(rows, weights, segments_of_groups(sizes), ExpertKernels(gate, up, down))
    return jnp.square(made.astype(jnp.float32)).sum()

for dtype, embed, mlp in [("bfloat16", 256, 384), ("float32", 96, 80), ("float16", 100, 100)]:
    inner, outer = shape(8, embed, mlp, dtype=dtype), shape(8, mlp, embed, dtype=dtype)
    inputs = shape(2048, embed, dtype=dtype), shape(2048, dtype=jnp.float32), inner, inner, outer
    gradient = jax.jit(jax.grad(loss, tuple(range(5))), out_shardings=here)
    text = gradient.lower(*inputs, shape(8, dtype=jnp.int32)).compile().as_text()
    print(*kernels(text), sum(each.flops for each in matrix_products(text)))
"""


def test_the_compiler_for_h100_takes_it_and_its_flops_are_counted():
    pytest.importorskip("jax_plugins.xla_cuda13")
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    forward, backward = ["experts_hidden", "experts_outputs"], ["experts_d_hidden", "experts_d_input_kernels"]
    names = sorted([*forward, *backward, "experts_d_output_kernels", "experts_d_rows"])
    assert [line[:6] for line in lines] == [names] * 3
    # Three products forward; backward three to make h and its gradients, two for dx, and three for the kernels.
    assert lines[0][6] == str((3 + 3 + 2 + 3) * 2 * 2048 * 256 * 384)
