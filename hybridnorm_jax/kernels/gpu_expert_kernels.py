"""The kernels of the experts for GPUs, in Pallas (Triton); gpu_experts.py launches them.

Arguments before the first _ref are static. What ends with _ref is a whole array in the GPU's memory. A program computes
a tile of the result: some columns of the rows of one visit (segments.Visits), or a piece of one expert's gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.kernels.swiglu import swiglu_gradients

# Triton multiplies no matrix with a side below this one, and takes only powers of two.
SMALLEST = 16


class ProductTiles(NamedTuple):
    """How a kernel goes through products of (rows, inner) and (inner, columns).

    Attributes:
      rows, columns: of a tile of the result.
      inner: how much of the sum is read at once.
      warps: of 32 threads, which compute one tile together.
      stages: how many pieces of the sum are on their way from memory at once.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class _Visit:
    """The visit of this program: which rows of which tile belong to which expert."""

    def __init__(self, tiles: ProductTiles, refs: Sequence[Any]):
        count_ref, tile_ref, expert_ref, start_ref, end_ref = refs
        number = pl.program_id(1)
        self.tiles, self.count, self.number = tiles, count_ref[0], number
        self.tile, self.expert = tile_ref[number], expert_ref[number]
        self.start, self.end = start_ref[number], end_ref[number]
        self.rows = _piece(self.tile, tiles.rows)
        self.column_tile = pl.program_id(0)
        self.columns = _piece(self.column_tile, tiles.columns)

    @property
    def is_there(self) -> Array:
        """Whether there is anything to do."""
        return (self.number < self.count) & (self.start < self.end)

    @property
    def inside(self) -> Array:
        """Which rows of the tile belong to this visit."""
        positions = self.tile * self.tiles.rows + jnp.arange(self.tiles.rows)
        return (positions >= self.start) & (positions < self.end)

    def write(self, ref: Any, result: Array) -> None:
        """The visit's rows and columns of an array."""
        triton.store(ref.at[self.rows, self.columns], result.astype(ref.dtype), mask=self.inside[:, None])

    def nothing(self, like: Any) -> Array:
        """Zeros to add to."""
        return jnp.zeros((self.tiles.rows, self.tiles.columns), wide_dtype(like.dtype))


VISIT_REFS = 5


def experts_hidden(tiles: ProductTiles, *refs: Any) -> None:
    """w silu(x G) (x U), where x G and x U are rounded to the dtype of x."""
    visit = _Visit(tiles, refs[:VISIT_REFS])
    rows_ref, weights_ref, gate_ref, up_ref, hidden_ref = refs[VISIT_REFS:]

    @pl.when(visit.is_there)
    def _() -> None:
        def add(number: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            inner = _piece(number, tiles.inner)
            x = triton.load(rows_ref.at[visit.rows, inner])
            gate, up = (triton.load(ref.at[visit.expert, inner, visit.columns]) for ref in (gate_ref, up_ref))
            return sums[0] + _dot(x, gate, (1, 0)), sums[1] + _dot(x, up, (1, 0))

        nothing = visit.nothing(rows_ref)
        gated, upped = jax.lax.fori_loop(0, rows_ref.shape[1] // tiles.inner, add, (nothing, nothing))
        gated, upped = _rounded(gated, rows_ref), _rounded(upped, rows_ref)
        weights = weights_ref[visit.rows][:, None]
        visit.write(hidden_ref, weights * (gated * jax.nn.sigmoid(gated) * upped))


def experts_d_hidden(tiles: ProductTiles, *refs: Any) -> None:
    """x G, x U and dy D^T, and from them dg, du, h and this tile's part of dw: see swiglu.swiglu_gradients."""
    visit = _Visit(tiles, refs[:VISIT_REFS])
    rows_ref, d_out_ref, weights_ref, gate_ref, up_ref, down_ref, *results = refs[VISIT_REFS:]

    @pl.when(visit.is_there)
    def _() -> None:
        def add(number: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            inner = _piece(number, tiles.inner)
            x, d_out = (triton.load(ref.at[visit.rows, inner]) for ref in (rows_ref, d_out_ref))
            gate, up = (triton.load(ref.at[visit.expert, inner, visit.columns]) for ref in (gate_ref, up_ref))
            down = triton.load(down_ref.at[visit.expert, visit.columns, inner])
            gated, upped, d_weighted = sums
            return gated + _dot(x, gate, (1, 0)), upped + _dot(x, up, (1, 0)), d_weighted + _dot(d_out, down, (1, 1))

        nothing = visit.nothing(rows_ref)
        sums = jax.lax.fori_loop(0, rows_ref.shape[1] // tiles.inner, add, (nothing, nothing, nothing))
        weights = weights_ref[visit.rows][:, None]
        made = swiglu_gradients(_rounded(sums[0], rows_ref), _rounded(sums[1], rows_ref), weights, sums[2])
        d_gated_ref, d_upped_ref, hidden_ref, d_weights_ref = results
        visit.write(d_gated_ref, made.gated)
        visit.write(d_upped_ref, made.upped)
        visit.write(hidden_ref, made.hidden)
        part = d_weights_ref.at[visit.column_tile, visit.rows]
        triton.store(part, made.weights.sum(1), mask=visit.inside)


def experts_outputs(tiles: ProductTiles, *refs: Any) -> None:
    """h D."""
    visit = _Visit(tiles, refs[:VISIT_REFS])
    hidden_ref, down_ref, out_ref = refs[VISIT_REFS:]

    @pl.when(visit.is_there)
    def _() -> None:
        def add(number: Any, total: Array) -> Array:
            inner = _piece(number, tiles.inner)
            hidden = triton.load(hidden_ref.at[visit.rows, inner])
            return total + _dot(hidden, triton.load(down_ref.at[visit.expert, inner, visit.columns]), (1, 0))

        total = jax.lax.fori_loop(0, hidden_ref.shape[1] // tiles.inner, add, visit.nothing(hidden_ref))
        visit.write(out_ref, total)


def experts_d_rows(tiles: ProductTiles, *refs: Any) -> None:
    """dg G^T + du U^T."""
    visit = _Visit(tiles, refs[:VISIT_REFS])
    d_gated_ref, d_upped_ref, gate_ref, up_ref, out_ref = refs[VISIT_REFS:]

    @pl.when(visit.is_there)
    def _() -> None:
        def add(number: Any, total: Array) -> Array:
            inner = _piece(number, tiles.inner)
            for left_ref, right_ref in ((d_gated_ref, gate_ref), (d_upped_ref, up_ref)):
                left = triton.load(left_ref.at[visit.rows, inner])
                total = total + _dot(left, triton.load(right_ref.at[visit.expert, visit.columns, inner]), (1, 1))
            return total

        total = jax.lax.fori_loop(0, d_gated_ref.shape[1] // tiles.inner, add, visit.nothing(d_gated_ref))
        visit.write(out_ref, total)


def experts_d_input_kernels(tiles: ProductTiles, *refs: Any) -> None:
    """dG = sum x^T dg and dU = sum x^T du over the rows of one expert."""
    _d_kernels(tiles, *refs[:4], refs[4], refs[5:7], refs[7:])


def experts_d_output_kernels(tiles: ProductTiles, *refs: Any) -> None:
    """dD = sum h^T dy over the rows of one expert."""
    _d_kernels(tiles, *refs[:4], refs[4], refs[5:6], refs[6:])


def _d_kernels(
    tiles: ProductTiles,
    first_ref: Any,
    last_ref: Any,
    start_ref: Any,
    end_ref: Any,
    left_ref: Any,
    right_refs: Sequence[Any],
    out_refs: Sequence[Any],
) -> None:
    """sum left^T right over the rows of one expert: of its segments, which are numbers first to last - 1."""
    expert = pl.program_id(2)
    height, width = _piece(pl.program_id(0), tiles.rows), _piece(pl.program_id(1), tiles.columns)

    def add_segment(segment: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        start, end = start_ref[segment], end_ref[segment]

        def add(number: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            place = _piece(number, tiles.inner)
            positions = number * tiles.inner + jnp.arange(tiles.inner)
            inside = ((positions >= start) & (positions < end))[:, None]
            # Both sides are masked: rows of no segment may hold NaN, and 0 * NaN is NaN.
            left = triton.load(left_ref.at[place, height], mask=inside, other=0)
            rights = (triton.load(ref.at[place, width], mask=inside, other=0) for ref in right_refs)
            return tuple(total + _dot(left, right, (0, 0)) for total, right in zip(totals, rights, strict=True))

        depth = jnp.asarray(tiles.inner, start.dtype)
        first = jax.lax.div(start, depth)
        last = jnp.where(start < end, jax.lax.div(end + depth - 1, depth), first)
        return jax.lax.fori_loop(first, last, add, totals)

    nothing = jnp.zeros((tiles.rows, tiles.columns), wide_dtype(left_ref.dtype))
    totals = tuple(nothing for _ in right_refs)
    totals = jax.lax.fori_loop(first_ref[expert], last_ref[expert], add_segment, totals)
    for out_ref, total in zip(out_refs, totals, strict=True):
        triton.store(out_ref.at[expert, height, width], total.astype(out_ref.dtype))


def _piece(number: Any, size: int) -> Any:
    return pl.dslice(number * size, size)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The product over a dimension of each, in float32 at least."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=wide_dtype(a.dtype))


def _rounded(total: Array, like: Any) -> Array:
    """The sum rounded to the dtype of an array, in its own dtype."""
    return total.astype(like.dtype).astype(total.dtype)
