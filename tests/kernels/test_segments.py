"""Rows in segments: every row is visited once, in the order asked for; and what the fused experts make of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal
from jax.experimental import pallas as pl

from hybridnorm_jax.kernels import tpu_fused, tpu_visits
from hybridnorm_jax.kernels.segments import Segments, segments_of_groups, visits_by_expert, visits_by_row
from hybridnorm_jax.kernels.swiglu import ExpertKernels

EXPERTS = 4
# (start, end, expert): expert 2 has two segments and expert 3 none, 150 and 300 lie within a tile, rows 310 to 319 and
# the last ones belong to nobody.
PIECES = [(0, 150, 0), (150, 150, 3), (150, 300, 2), (300, 301, 1), (301, 310, 0), (320, 384, 2)]
ROWS = 512


def _segments(pieces):
    return Segments(*(jnp.asarray(column, jnp.int32) for column in zip(*pieces, strict=True)))


@functools.cache
def _compiled(visits):
    """Of visits_by_row or visits_by_expert: the numbers behind the segments are static."""
    return jax.jit(visits, static_argnums=(1, 2, 3) if visits is visits_by_expert else (1, 2))


def _visited(visits, tile):
    """[(expert, row), ...] in the order of the visits."""
    visits = jax.tree.map(np.asarray, visits)
    found = []
    for number in range(int(visits.count)):
        rows = range(int(visits.tile[number]) * tile, (int(visits.tile[number]) + 1) * tile)
        inside = [row for row in rows if visits.start[number] <= row < visits.end[number]]
        found += [(int(visits.expert[number]), row) for row in inside]
    return found


@pytest.mark.parametrize("pieces", [PIECES, [(0, 512, 1)], [(0, 0, 0), (0, 0, 2)], [(511, 512, 3)]], ids=str)
@pytest.mark.parametrize("tile", [64, 128])
def test_visits_are_of_every_row_once(pieces, tile):
    expected = [(expert, row) for start, end, expert in pieces for row in range(start, end)]
    by_row = _compiled(visits_by_row)(_segments(pieces), ROWS, tile)
    assert _visited(by_row, tile) == expected
    assert np.all(np.diff(by_row.tile[: int(by_row.count)]) >= 0)
    by_expert = _compiled(visits_by_expert)(_segments(pieces), EXPERTS, ROWS, tile)
    assert _visited(by_expert, tile) == sorted(expected, key=lambda pair: pair[0])
    assert set(np.asarray(by_expert.expert[: int(by_expert.count)])) == set(range(EXPERTS))
    assert int(by_expert.count) <= len(by_expert.tile)


def test_groups_are_segments_one_after_the_other():
    segments = segments_of_groups(jnp.asarray([3, 0, 2]))
    assert [array.tolist() for array in segments] == [[0, 3, 3], [3, 3, 5], [0, 1, 2]]


def _formula(expert, x, weights, gate, up, down):
    """The experts row by row; rows of nobody are zero."""
    gated = jnp.einsum("rd,rdm->rm", x, gate[expert])
    upped = jnp.einsum("rd,rdm->rm", x, up[expert])
    y = jnp.einsum("rm,rmd->rd", weights[:, None] * jax.nn.silu(gated) * upped, down[expert])
    return jnp.where((expert >= 0)[:, None], y, 0)


def _with_gradients(function, inputs, d_out):
    """The value and the gradients of all inputs, in NumPy."""

    @jax.jit
    def both(inputs, d_out):
        value, pull = jax.vjp(function, *inputs)
        return value, *pull(d_out)

    return [np.asarray(array) for array in both(inputs, d_out)]


# float32: rounding errors of 6e-8 in sums of at most 300 terms. bfloat16: of 4e-3 in x G, x U and every result.
NARROW = {"bfloat16": 2e-2, "float32": 2e-6}


@pytest.mark.parametrize(("sizes", "dtype"), diagonal([(128, 384), (40, 20)], NARROW, apart=2))
def test_fused_experts_are_the_formula_on_segments(sizes, dtype, monkeypatch):
    """Rows of nobody are NaN, and so are their weights and cotangents: nothing of them is seen anywhere."""
    monkeypatch.setattr(tpu_visits, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    (embed, mlp), tolerance = sizes, NARROW[dtype]
    rng = np.random.default_rng(0)
    shapes = (ROWS, embed), (ROWS,), (EXPERTS, embed, mlp), (EXPERTS, embed, mlp), (EXPERTS, mlp, embed), (ROWS, embed)
    drawn = (rng.standard_normal(shape) * shape[-1] ** -0.25 for shape in shapes)
    *inputs, d_out = (np.asarray(jnp.asarray(array, dtype), np.float64) for array in drawn)
    expert = np.full(ROWS, -1)
    for start, end, number in PIECES:
        expert[start:end] = number
    owned = expert >= 0
    with jax.enable_x64(True):
        expected = _with_gradients(functools.partial(_formula, expert), inputs, np.where(owned[:, None], d_out, 0))

    def ours(x, weights, gate, up, down):
        return tpu_fused.fused(x, weights, _segments(PIECES), ExpertKernels(gate, up, down))

    x, weights, *kernels = inputs
    holes = [np.where(owned[:, None], x, np.nan), np.where(owned, weights, np.nan), *kernels]
    hole = jnp.asarray(np.where(owned[:, None], d_out, np.nan), dtype)
    got = _with_gradients(ours, [jnp.asarray(array, dtype) for array in holes], hole)
    for name, array, reference in zip(("y", "x", "weights", "gate", "up", "down"), got, expected, strict=True):
        array = np.asarray(array, np.float64)
        if name in ("y", "x", "weights"):
            array, reference = array[owned], reference[owned]
        np.testing.assert_allclose(array, reference, rtol=0, atol=tolerance * np.abs(reference).max(), err_msg=name)


def test_blocks_of_channels_divide_them_and_are_two_at_least():
    assert tpu_visits.channel_block(1024, bytes_of_channel=1, other_bytes=0) == 512
    assert tpu_visits.channel_block(128, bytes_of_channel=1, other_bytes=0) == 128
    assert tpu_visits.channel_block(14336, bytes_of_channel=2**15, other_bytes=0) == 512
