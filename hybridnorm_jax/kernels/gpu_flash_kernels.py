"""The kernels of flash attention for GPUs, in Pallas (Triton); gpu_flash.py launches them.

Arguments that are named `tiles`, `head_dim` and `scale` are static. What ends with _ref, and what a NamedTuple of Refs
holds, is an array in the GPU's memory. Products of float32 are what jax_default_matmul_precision says: TF32 by default.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from hybridnorm_jax.kernels.flash_tiles import Tiles, padded_head_dim
from hybridnorm_jax.kernels.precision import wide_dtype

# The score of a pair that does not see each other. It is finite, so that a row of them alone makes no NaN; what such a
# row adds is multiplied by exp(HIDDEN - maximum) = 0 as soon as a key is seen, and each query sees itself.
HIDDEN = -1e30
_LOG2_E = math.log2(math.e)


def quotient(number: Any, by: int) -> Any:
    """number // by for what is not negative; Triton has no `//` for numbers that may be."""
    return jax.lax.div(number, jnp.asarray(by, number.dtype))


class _Reader:
    """Loads and stores tiles of heads, whose channels are filled up with zeros to a power of two."""

    def __init__(self, head_dim: int):
        width = padded_head_dim(head_dim)
        self._inside = None if width == head_dim else (jnp.arange(width) < head_dim)[None, :]

    def load(self, ref: Any) -> Array:
        """A tile of (positions, channels)."""
        if self._inside is None:
            return triton.load(ref)
        return triton.load(ref, mask=self._inside, other=0)

    def store(self, ref: Any, tile: Array) -> None:
        """Write what load reads."""
        triton.store(ref, tile.astype(ref.dtype), mask=self._inside)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The product over a dimension of each, in float32 at least."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=wide_dtype(a.dtype))


class _Diagonal(NamedTuple):
    """What a kernel knows of who sees whom; rows and columns of a tile count from its first ones."""

    tiles: Tiles
    start: Any

    def row_positions(self, tile: Any) -> Array:
        """Of a tile's queries."""
        return self.start + tile * self.tiles.rows + jnp.arange(self.tiles.rows)

    def column_positions(self, tile: Any) -> Array:
        """Of a tile's keys."""
        return tile * self.tiles.columns + jnp.arange(self.tiles.columns)

    def visible(self, row_tile: Any, column_tile: Any) -> Array:
        """Which pairs of a tile see each other if they are in one segment."""
        return self.row_positions(row_tile)[:, None] >= self.column_positions(column_tile)[None, :]

    def first_masked_column(self, row_tile: Any) -> Any:
        """The first tile of columns with a key that a query of this tile does not see."""
        return quotient(self.start + row_tile * self.tiles.rows + 1, self.tiles.columns)

    def columns_end(self, row_tile: Any, columns: int) -> Any:
        """One past the last tile of columns with a key that a query of this tile sees."""
        seen = self.start + (row_tile + 1) * self.tiles.rows
        return quotient(jnp.minimum(seen, columns) + self.tiles.columns - 1, self.tiles.columns)

    def first_row(self, column_tile: Any) -> Any:
        """The first tile of rows with a query that sees a key of this tile."""
        return quotient(jnp.maximum(column_tile * self.tiles.columns - self.start, 0), self.tiles.rows)

    def first_whole_row(self, column_tile: Any) -> Any:
        """The first tile of rows whose queries all see all keys of this tile."""
        last = (column_tile + 1) * self.tiles.columns - 1 - self.start
        return quotient(jnp.maximum(last, 0) + self.tiles.rows - 1, self.tiles.rows)


def _diagonal(tiles: Tiles, start_ref: Any) -> _Diagonal:
    return _Diagonal(tiles, 0 if start_ref is None else start_ref[0])


def _mask(
    diagonal: _Diagonal, row_tile: Any, column_tile: Any, row_ids: Array | None, column_ids: Array | None
) -> Array:
    visible = diagonal.visible(row_tile, column_tile)
    if row_ids is None or column_ids is None:
        return visible
    return visible & (row_ids[:, None] == column_ids[None, :])


def _through(start: Any, border: Any, end: Any, visit: Callable[..., Any], carry: Any, *, masked_first: bool) -> Any:
    """visit(masked, i, carry) for i from start to end; only on one side of the border with a mask."""
    low, high = functools.partial(visit, masked_first), functools.partial(visit, not masked_first)
    border = jnp.minimum(jnp.maximum(border, start), end)
    carry = jax.lax.fori_loop(start, border, low, carry)
    return jax.lax.fori_loop(border, end, high, carry)


def _tile(number: Any, size: int) -> Any:
    return pl.dslice(number * size, size)


class _Columns:
    """What the kernels over rows share: which tiles of keys a tile of queries goes through."""

    def __init__(self, tiles: Tiles, head_dim: int, scale: float, refs: "_RowRefs"):
        self.tiles, self.refs, self.reader = tiles, refs, _Reader(head_dim)
        self.row_tile = pl.num_programs(0) - 1 - pl.program_id(0)
        self.diagonal = _diagonal(tiles, refs.start)
        self.row_ids = None if refs.row_ids is None else refs.row_ids[...]
        self.query = self.reader.load(refs.query)
        # exp(x) = exp2(x log2(e)): a GPU has the exponential to the base 2.
        self.scale = scale * _LOG2_E

    def scores(self, masked: bool, column_tile: Any, key: Array, hidden: float) -> Array:
        """Scores times log2(e), `hidden` where a pair does not see each other."""
        scores = self.scale * _dot(self.query, key, (1, 1))
        if not masked and self.row_ids is None:
            return scores
        column_ids = None
        if self.row_ids is not None:
            column_ids = self.refs.column_ids[_tile(column_tile, self.tiles.columns)]
        mask = _mask(self.diagonal, self.row_tile, column_tile, self.row_ids, column_ids)
        return jnp.where(mask, scores, hidden)

    def key_and_value(self, column_tile: Any) -> tuple[Array, Array]:
        """Of a tile."""
        place = _tile(column_tile, self.tiles.columns)
        return self.reader.load(self.refs.key.at[place, :]), self.reader.load(self.refs.value.at[place, :])

    def visit(self, body: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
        """carry = body(masked, tile of columns, carry), from the first tile to the diagonal."""
        first = 0 if self.refs.bounds is None else self.refs.bounds[self.row_tile]
        border = self.diagonal.first_masked_column(self.row_tile)
        end = self.diagonal.columns_end(self.row_tile, self.refs.key.shape[0])
        return _through(first, border, end, body, carry, masked_first=False)


class _RowRefs(NamedTuple):
    """What every kernel over rows reads."""

    start: Any
    bounds: Any
    row_ids: Any
    column_ids: Any
    query: Any
    key: Any
    value: Any


def flash_forward(tiles: Tiles, head_dim: int, scale: float, *refs: Any) -> None:
    """The context of a tile of queries, and the logarithm of the denominator."""
    *inputs, context_ref, log_total_ref = refs
    columns = _Columns(tiles, head_dim, scale, _RowRefs(*inputs))
    wide = log_total_ref.dtype

    def body(masked: bool, tile: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        context, total, highest = carry
        key, value = columns.key_and_value(tile)
        scores = columns.scores(masked, tile, key, HIDDEN)
        higher = jnp.maximum(highest, scores.max(1))
        weights = jnp.exp2(scores - higher[:, None])
        shrink = jnp.exp2(highest - higher)
        context = context * shrink[:, None] + _dot(weights.astype(value.dtype), value, (1, 0))
        return context, total * shrink + weights.sum(1), higher

    context = jnp.zeros((tiles.rows, columns.query.shape[1]), wide)
    total, highest = jnp.zeros(tiles.rows, wide), jnp.full(tiles.rows, HIDDEN, wide)
    context, total, highest = columns.visit(body, (context, total, highest))
    columns.reader.store(context_ref, context / total[:, None])
    log_total_ref[...] = (highest + jnp.log2(total)) / _LOG2_E


def flash_d_query(tiles: Tiles, head_dim: int, scale: float, *refs: Any) -> None:
    """The gradient of a tile of queries."""
    *inputs, d_context_ref, log_total_ref, inner_ref, d_query_ref = refs
    columns = _Columns(tiles, head_dim, scale, _RowRefs(*inputs))
    d_context = columns.reader.load(d_context_ref)
    log_total, inner = log_total_ref[...] * _LOG2_E, inner_ref[...]

    def body(masked: bool, tile: Any, d_query: Array) -> Array:
        key, value = columns.key_and_value(tile)
        weights = jnp.exp2(columns.scores(masked, tile, key, HIDDEN) - log_total[:, None])
        d_weights = _dot(d_context, value, (1, 1))
        d_scores = (weights * (d_weights - inner[:, None])).astype(key.dtype)
        return d_query + _dot(d_scores, key, (1, 0))

    nothing = jnp.zeros((tiles.rows, columns.query.shape[1]), log_total_ref.dtype)
    columns.reader.store(d_query_ref, scale * columns.visit(body, nothing))


def flash_d_key_value(tiles: Tiles, head_dim: int, scale: float, *refs: Any) -> None:
    """The gradients of a tile of keys and of their values, summed over the query heads that read them."""
    *inputs, d_context_ref, log_total_ref, inner_ref, d_key_ref, d_value_ref = refs
    given = _RowRefs(*inputs)
    reader, column_tile = _Reader(head_dim), pl.program_id(0)
    diagonal = _diagonal(tiles, given.start)
    column_ids = None if given.column_ids is None else given.column_ids[...]
    key, value = reader.load(given.key), reader.load(given.value)
    rows, readers = given.query.shape[0] // tiles.rows, given.query.shape[1]

    def body(head: Any, masked: bool, row_tile: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_key, d_value = carry
        place = _tile(row_tile, tiles.rows)
        query, d_context = reader.load(given.query.at[place, head, :]), reader.load(d_context_ref.at[place, head, :])
        log_total, inner = log_total_ref[head, place] * _LOG2_E, inner_ref[head, place]
        scores = scale * _LOG2_E * _dot(query, key, (1, 1))
        if masked or column_ids is not None:
            row_ids = None if given.row_ids is None else given.row_ids[place]
            scores = jnp.where(_mask(diagonal, row_tile, column_tile, row_ids, column_ids), scores, HIDDEN)
        weights = jnp.exp2(scores - log_total[:, None])
        d_weights = _dot(d_context, value, (1, 1))
        d_scores = (weights * (d_weights - inner[:, None])).astype(query.dtype)
        d_key = d_key + _dot(d_scores, query, (0, 0))
        return d_key, d_value + _dot(weights.astype(d_context.dtype), d_context, (0, 0))

    def head_body(head: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        first, border = diagonal.first_row(column_tile), diagonal.first_whole_row(column_tile)
        end = rows if given.bounds is None else given.bounds[column_tile]
        return _through(first, border, jnp.maximum(end, first), functools.partial(body, head), carry, masked_first=True)

    nothing = jnp.zeros((tiles.columns, key.shape[1]), log_total_ref.dtype)
    d_key, d_value = jax.lax.fori_loop(0, readers, head_body, (nothing, nothing))
    reader.store(d_key_ref, scale * d_key)
    reader.store(d_value_ref, d_value)
