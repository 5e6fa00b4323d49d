"""Causal attention by kernels of our own for GPUs, in Pallas (Triton): whole sequences or shares of split ones.

FlashAttention-2 (2307.08691). A tile of scores, some queries against some keys, is made, used and forgotten on the
chip. The forward kernel goes for a tile's queries through the keys up to the diagonal. The backward pass recomputes the
weights from the logarithm of their denominator, in two kernels without atomic additions, so that it always adds in the
same order: one goes through the keys of some queries, the other through the queries of some keys, and of all query
heads that read them. Tiles beyond the diagonal are not visited, nor are tiles before the first or after the last one
that shares a segment with the queries or keys. Only tiles on the diagonal, or all where there are segments, are masked.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Int

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads, KeyValueHeads, SegmentIds
from hybridnorm_jax.kernels.attention_on_mesh import on_mesh, sequence_axes
from hybridnorm_jax.kernels.flash_tiles import AttentionTiles, Tiles, attention_tiles, padded_head_dim
from hybridnorm_jax.kernels.gpu_flash_kernels import flash_d_key_value, flash_d_query, flash_forward, quotient
from hybridnorm_jax.kernels.precision import wide_dtype, widened
from hybridnorm_jax.kernels.zigzag import from_zigzag, gather_sequence, to_zigzag
from hybridnorm_jax.mesh.split_axes import Axes


def flash_attention(inputs: AttentionInputs, *, scale: float, saved_as: str) -> Heads:
    """softmax_attention; on a mesh once per device, on its share of sequences, heads and positions.

    Args:
      scale: factor of q k^T.
      saved_as: checkpoint name of what the backward pass needs besides query, key and value.
    """
    how = _How(scale, saved_as)
    if jax.sharding.get_abstract_mesh().empty:
        return _whole(inputs, how=how)
    axes = sequence_axes(inputs.query.shape[1])
    local = functools.partial(_share, axes=axes) if axes else _whole
    return on_mesh(functools.partial(local, how=how), inputs, sequence=axes)


class _How(NamedTuple):
    """The arguments of flash_attention of these names."""

    scale: float
    saved_as: str


class _Stretch(NamedTuple):
    """Consecutive queries, with the keys of their whole sequence.

    Attributes:
      start: the position of the first query, of shape (1,); None: 0.
      row_ids, column_ids: segment ids of queries and keys, or None.
    """

    query: Heads
    key: KeyValueHeads
    value: KeyValueHeads
    start: Int[Array, " one"] | None
    row_ids: SegmentIds
    column_ids: SegmentIds


def _whole(inputs: AttentionInputs, *, how: _How) -> Heads:
    """All positions on one device."""
    query, key, value, ids = inputs
    return _padded(_Stretch(query, key, value, start=None, row_ids=ids, column_ids=ids), how)


def _share(inputs: AttentionInputs, *, axes: Axes, how: _How) -> Heads:
    """Inside jax.shard_map: one device's share of the positions, two halves of a stretch, see zigzag.py."""
    shards, device = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    query, ids = to_zigzag(inputs.query, axes), inputs.segment_ids
    key, value = gather_sequence(inputs.key, axes), gather_sequence(inputs.value, axes)
    half = query.shape[1] // 2
    contexts = []
    for place, number in enumerate((device, 2 * shards - 1 - device)):
        rows = slice(place * half, (place + 1) * half)
        stretch = _Stretch(
            query=query[:, rows],
            key=key,
            value=value,
            start=(number * half).astype(jnp.int32)[None],
            row_ids=None if ids is None else to_zigzag(ids, axes)[:, rows],
            column_ids=None if ids is None else gather_sequence(ids, axes),
        )
        contexts.append(_padded(stretch, how))
    return from_zigzag(jnp.concatenate(contexts, axis=1), axes)


def _padded(stretch: _Stretch, how: _How) -> Heads:
    """_attend, with positions filled up to whole tiles. No token sees such keys, and nobody reads such queries."""
    rows, tiles = stretch.query.shape[1], _tiles(stretch)

    def pad(x: Array | None, mode: str = "constant") -> Array | None:
        if x is None or x.shape[1] % tiles.longest == 0:
            return x
        filled = [(0, 0)] * x.ndim
        filled[1] = (0, -x.shape[1] % tiles.longest)
        return jnp.pad(x, filled, mode=mode)

    # A query of the filling is in the last segment, so that it sees a key, and its weights are numbers.
    whole = stretch._replace(
        query=pad(stretch.query),
        key=pad(stretch.key),
        value=pad(stretch.value),
        row_ids=pad(stretch.row_ids, "edge"),
        column_ids=pad(stretch.column_ids, "edge"),
    )
    return _attend(whole, tiles, how)[:, :rows]


def _tiles(stretch: _Stretch) -> AttentionTiles:
    query = stretch.query
    return attention_tiles(min(query.shape[1], stretch.key.shape[1]), query.shape[-1], query.dtype.itemsize)


class _Residuals(NamedTuple):
    """What the backward pass needs; log_total is (batch, heads, queries), in float32 at least."""

    stretch: _Stretch
    context: Heads
    log_total: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(stretch: _Stretch, tiles: AttentionTiles, how: _How) -> Heads:
    return _forward(stretch, tiles, how)[0]


def _forward(stretch: _Stretch, tiles: AttentionTiles, how: _How) -> tuple[Heads, _Residuals]:
    batch, rows, heads, _ = stretch.query.shape
    launch = _Launch(stretch, tiles.forward, how.scale)
    log_totals = jax.ShapeDtypeStruct((batch, heads, rows), wide_dtype(stretch.query.dtype))
    context, log_total = launch.over_rows(
        flash_forward,
        operands=[],
        results=[(stretch.query, launch.row_heads), (log_totals, launch.row_numbers)],
    )
    context, log_total = checkpoint_name((context, log_total), how.saved_as)
    return context, _Residuals(stretch, context, log_total)


def _backward(tiles: AttentionTiles, how: _How, residuals: _Residuals, d_context: Heads) -> tuple[_Stretch]:
    stretch, context, log_total = residuals
    # What softmax's derivative subtracts in each row: sum_k weight d_weight = context . d_context.
    inner = (widened(context) * widened(d_context)).sum(-1).swapaxes(1, 2)
    launch = _Launch(stretch, tiles.d_query, how.scale)
    (d_query,) = launch.over_rows(
        flash_d_query,
        operands=[
            (d_context, launch.row_heads),
            (log_total, launch.row_numbers),
            (inner, launch.row_numbers),
        ],
        results=[(stretch.query, launch.row_heads)],
    )
    launch = _Launch(stretch, tiles.d_key_value, how.scale)
    d_key, d_value = launch.over_columns(
        flash_d_key_value,
        operands=[
            (d_context, launch.readers_heads),
            (log_total, launch.readers_numbers),
            (inner, launch.readers_numbers),
        ],
        results=[(stretch.key, launch.column_heads), (stretch.value, launch.column_heads)],
    )
    return (_Stretch(d_query, d_key, d_value, start=None, row_ids=None, column_ids=None),)


_attend.defvjp(_forward, _backward)


# ---- How the kernels are launched.

_Operand = tuple[Any, pl.BlockSpec]


class _Launch:
    """One kernel over all tiles of queries or of keys, all heads and all sequences.

    Attributes:
      row_heads, row_numbers, column_heads: the part of an array that one program reads or writes: a tile of its rows or
        columns, of one head and sequence.
      readers_heads, readers_numbers: all rows, of the query heads that read one key head.
    """

    def __init__(self, stretch: _Stretch, tiles: Tiles, scale: float):
        self.stretch, self.tiles, self.scale = stretch, tiles, scale
        self.batch, self.rows, self.heads, self.head_dim = stretch.query.shape
        _, self.columns, self.kv_heads, _ = stretch.key.shape
        self.readers = self.heads // self.kv_heads
        width = padded_head_dim(self.head_dim)
        last = self.rows // tiles.rows - 1
        # The last rows have most to do. Where they start first, nobody waits for them in the end.
        self.row_heads = pl.BlockSpec((None, tiles.rows, None, width), lambda i, h, b: (b, last - i, h, 0))
        self.row_numbers = pl.BlockSpec((None, None, tiles.rows), lambda i, h, b: (b, h, last - i))
        self._row_ids = pl.BlockSpec((None, tiles.rows), lambda i, h, b: (b, last - i))
        self._read_heads = pl.BlockSpec(
            (None, self.columns, None, width), lambda i, h, b: (b, 0, quotient(h, self.readers), 0)
        )
        self.column_heads = pl.BlockSpec((None, tiles.columns, None, width), lambda i, h, b: (b, i, h, 0))
        self.readers_heads = pl.BlockSpec((None, self.rows, self.readers, width), lambda i, h, b: (b, 0, h, 0))
        self.readers_numbers = pl.BlockSpec((None, self.readers, self.rows), lambda i, h, b: (b, h, 0))
        self._column_ids = pl.BlockSpec((None, tiles.columns), lambda i, h, b: (b, i))

    def over_rows(
        self, kernel: Callable[..., None], *, operands: list[_Operand], results: list[_Operand]
    ) -> tuple[Array, ...]:
        """A program for each tile of queries, which goes through keys."""
        stretch = self.stretch
        bounds = None if stretch.row_ids is None else self._first_columns()
        inputs = [
            (bounds, pl.BlockSpec((None, bounds.shape[1]), lambda i, h, b: (b, 0)) if bounds is not None else None),
            (stretch.row_ids, self._row_ids),
            (stretch.column_ids, pl.BlockSpec((None, self.columns), lambda i, h, b: (b, 0))),
            (stretch.query, self.row_heads),
            (stretch.key, self._read_heads),
            (stretch.value, self._read_heads),
            *operands,
        ]
        return self._call(kernel, (self.rows // self.tiles.rows, self.heads, self.batch), inputs, results)

    def over_columns(
        self, kernel: Callable[..., None], *, operands: list[_Operand], results: list[_Operand]
    ) -> tuple[Array, ...]:
        """A program for each tile of keys, which goes through the queries of all heads that read them."""
        stretch = self.stretch
        bounds = None if stretch.row_ids is None else self._last_rows()
        inputs = [
            (bounds, pl.BlockSpec((None, bounds.shape[1]), lambda i, h, b: (b, 0)) if bounds is not None else None),
            (stretch.row_ids, pl.BlockSpec((None, self.rows), lambda i, h, b: (b, 0))),
            (stretch.column_ids, self._column_ids),
            (stretch.query, self.readers_heads),
            (stretch.key, self.column_heads),
            (stretch.value, self.column_heads),
            *operands,
        ]
        return self._call(kernel, (self.columns // self.tiles.columns, self.kv_heads, self.batch), inputs, results)

    def _call(
        self,
        kernel: Callable[..., None],
        grid: tuple[int, int, int],
        inputs: list[tuple[Array | None, pl.BlockSpec | None]],
        results: list[_Operand],
    ) -> tuple[Array, ...]:
        start = self.stretch.start
        inputs = [(start, pl.BlockSpec((1,), lambda i, h, b: (0,))), *inputs]
        call = pl.pallas_call(
            functools.partial(kernel, self.tiles, self.head_dim, self.scale),
            grid=grid,
            in_specs=[None if array is None else spec for array, spec in inputs],
            out_specs=[spec for _, spec in results],
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in results],
            compiler_params=triton.CompilerParams(num_warps=self.tiles.warps, num_stages=self.tiles.stages),
            name=kernel.__name__,
        )
        return tuple(call(*(array for array, _ in inputs)))

    def _shares_segment(self) -> Array:
        """(batch, tiles of rows, tiles of columns): whether the ranges of their segment ids overlap."""
        rows = self.stretch.row_ids.reshape(self.batch, -1, 1, self.tiles.rows)
        columns = self.stretch.column_ids.reshape(self.batch, 1, -1, self.tiles.columns)
        return (rows.min(-1) <= columns.max(-1)) & (rows.max(-1) >= columns.min(-1))

    def _first_columns(self) -> Array:
        """For each tile of rows, the first tile of columns that shares a segment with it."""
        return jnp.argmax(self._shares_segment(), axis=2).astype(jnp.int32)

    def _last_rows(self) -> Array:
        """For each tile of columns, one past the last tile of rows that shares a segment with it."""
        shares = self._shares_segment()
        return (shares.shape[1] - jnp.argmax(shares[:, ::-1], axis=1)).astype(jnp.int32)
