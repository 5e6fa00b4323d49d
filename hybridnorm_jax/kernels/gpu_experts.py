"""The experts by kernels of our own for GPUs, in Pallas (Triton), forward and backward.

Forward of a row x with the kernels G, U, D (gate, up, down) of its expert and its weight w:

    h = w silu(x G) (x U)                one kernel; x G and x U stay on the chip
    y = h D                              one kernel

Backward, where nothing but x, w and the kernels has been kept:

    x G, x U, dy D^T -> dg, du, h, dw    one kernel, see swiglu.swiglu_gradients
    dx = dg G^T + du U^T                 one kernel
    dG = sum x^T dg, dU = sum x^T du     one kernel
    dD = sum h^T dy                      one kernel

Rows are cut into tiles. A tile in which one segment ends and another begins is visited once for each of them, and each
visit writes its own rows alone; programs beyond the visits that a step needs end at once. Nothing is added atomically,
so that the same numbers give the same sums.

jax.experimental.pallas.ops.gpu.ragged_dot_mgpu would be an alternative for the products, on Hopper alone, for 16-bit
numbers alone and for sizes that are multiples of its blocks; nobody has compared the two on a GPU yet.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels import gpu_expert_kernels as gpu
from hybridnorm_jax.kernels.expert_rows import Rows, pad_rows
from hybridnorm_jax.kernels.gpu_expert_kernels import SMALLEST, ProductTiles
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.kernels.segments import Segments, Visits, visits_by_row
from hybridnorm_jax.kernels.swiglu import ExpertKernels

RowWeights = Float[Array, " rows"]
Hidden = Float[Array, "rows mlp"]


def gpu_experts(rows: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels) -> Rows:
    """expert_dispatch.apply_grouped_experts for rows in segments; rows of none are undefined.

    They are undefined in the gradient of rows and of row_weights too, and nothing of them, of their weights or
    cotangents reaches another gradient.
    """
    count, embed = rows.shape
    more_embed, more_mlp = -embed % SMALLEST, -kernels.gate.shape[2] % SMALLEST
    if more_embed or more_mlp:
        into_mlp = ((0, 0), (0, more_embed), (0, more_mlp))
        rows = jnp.pad(rows, ((0, 0), (0, more_embed)))
        kernels = kernels.replace(
            gate=jnp.pad(kernels.gate, into_mlp),
            up=jnp.pad(kernels.up, into_mlp),
            down=jnp.pad(kernels.down, ((0, 0), (0, more_mlp), (0, more_embed))),
        )
    height = _tile_rows(count, len(segments.start), rows.dtype.itemsize)
    rows, row_weights = pad_rows(rows, -count % height), pad_rows(row_weights, -count % height)
    return _experts(rows, row_weights, segments, kernels, height)[:count, :embed]


def _tile_rows(rows: int, segments: int, itemsize: int) -> int:
    """Rows of a tile: no more than the mean segment needs."""
    height = SMALLEST
    while height < min(-(-rows // segments), 128 if itemsize <= 2 else 64):
        height *= 2
    return height


def _dividing(size: int, largest: int) -> int:
    """The largest power of two that divides `size`, at most `largest`."""
    return min(size & -size, largest)


def _tiles(height: int, columns: int, inner: int, *, itemsize: int, widest: int, stages: int = 3) -> ProductTiles:
    """Tiles that divide `columns` and `inner`.

    Not measured on a GPU: they were chosen by what XLA's compiler says of the kernels' memory and registers.

    Args:
      widest: columns at most, in 16-bit numbers; of float32 half as many.
    """
    narrow = itemsize <= 2
    width, depth = _dividing(columns, widest if narrow else widest // 2), _dividing(inner, 64 if narrow else 32)
    return ProductTiles(height, width, depth, 8 if height * width > 64 * 32 else 4, stages)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts(rows: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels, height: int) -> Rows:
    visits, itemsize = visits_by_row(segments, len(rows), height), rows.dtype.itemsize
    _, embed, mlp = kernels.gate.shape
    (hidden,) = _over_visits(
        gpu.experts_hidden,
        visits,
        _tiles(height, mlp, embed, itemsize=itemsize, widest=64),
        operands=[rows, _wide(row_weights, rows), kernels.gate, kernels.up],
        results=[jax.ShapeDtypeStruct((len(rows), mlp), rows.dtype)],
        columns=mlp,
    )
    (outputs,) = _over_visits(
        gpu.experts_outputs,
        visits,
        _tiles(height, embed, mlp, itemsize=itemsize, widest=128),
        operands=[hidden, kernels.down],
        results=[jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        columns=embed,
    )
    return outputs


class _Residuals(NamedTuple):
    rows: Rows
    row_weights: RowWeights
    segments: Segments
    kernels: ExpertKernels


def _forward(
    rows: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels, height: int
) -> tuple[Rows, _Residuals]:
    outputs = _experts(rows, row_weights, segments, kernels, height)
    return outputs, _Residuals(rows, row_weights, segments, kernels)


def _backward(height: int, residuals: _Residuals, d_out: Rows) -> tuple[Rows, RowWeights, None, ExpertKernels]:
    rows, row_weights, segments, kernels = residuals
    visits, itemsize = visits_by_row(segments, len(rows), height), rows.dtype.itemsize
    _, embed, mlp = kernels.gate.shape
    of_hidden = _tiles(height, mlp, embed, itemsize=itemsize, widest=64, stages=2)
    like_hidden = jax.ShapeDtypeStruct((len(rows), mlp), rows.dtype)
    weights = _wide(row_weights, rows)
    d_gated, d_upped, hidden, d_weights = _over_visits(
        gpu.experts_d_hidden,
        visits,
        of_hidden,
        operands=[rows, d_out, weights, kernels.gate, kernels.up, kernels.down],
        # Each tile of columns has its own part of dw.
        results=[
            *[like_hidden] * 3,
            jax.ShapeDtypeStruct((mlp // of_hidden.columns, len(rows)), weights.dtype),
        ],
        columns=mlp,
    )
    (d_rows,) = _over_visits(
        gpu.experts_d_rows,
        visits,
        _tiles(height, embed, mlp, itemsize=itemsize, widest=128, stages=2),
        operands=[d_gated, d_upped, kernels.gate, kernels.up],
        results=[jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        columns=embed,
    )
    d_gate, d_up = _over_experts(gpu.experts_d_input_kernels, segments, rows, [d_gated, d_upped], kernels.gate)
    (d_down,) = _over_experts(gpu.experts_d_output_kernels, segments, hidden, [d_out], kernels.down)
    of_weights = d_weights.sum(0).astype(row_weights.dtype)
    return d_rows, of_weights, None, kernels.replace(gate=d_gate, up=d_up, down=d_down)


_experts.defvjp(_forward, _backward)


def _wide(row_weights: RowWeights, rows: Rows) -> RowWeights:
    return row_weights.astype(wide_dtype(rows.dtype))


def _over_visits(
    kernel: Callable[..., None],
    visits: Visits,
    tiles: ProductTiles,
    *,
    operands: Sequence[Array],
    results: Sequence[jax.ShapeDtypeStruct],
    columns: int,
) -> Sequence[Array]:
    """A program for each visit and each tile of columns."""
    count, *others = visits
    grid = (columns // tiles.columns, len(visits.tile))
    return _call(kernel, tiles, grid, [count[None].astype(jnp.int32), *others, *operands], results)


class _SegmentsOfExperts(NamedTuple):
    """All segments by expert: those of an expert are numbers first to last - 1."""

    first: Int[Array, " experts"]
    last: Int[Array, " experts"]
    start: Int[Array, " segments"]
    end: Int[Array, " segments"]


def _by_expert(segments: Segments, experts: int) -> _SegmentsOfExperts:
    order = jnp.argsort(segments.expert, stable=True)
    sorted_experts, numbers = segments.expert[order], jnp.arange(experts)
    found = _SegmentsOfExperts(
        first=jnp.searchsorted(sorted_experts, numbers, side="left"),
        last=jnp.searchsorted(sorted_experts, numbers, side="right"),
        start=segments.start[order],
        end=segments.end[order],
    )
    return jax.tree.map(lambda array: array.astype(jnp.int32), found)


def _over_experts(
    kernel: Callable[..., None], segments: Segments, left: Array, rights: Sequence[Array], like: Array
) -> Sequence[Array]:
    """A program for each tile of each expert's gradient."""
    experts, itemsize = len(like), left.dtype.itemsize
    largest = 128 if itemsize <= 2 else 64
    height = _dividing(left.shape[1], largest)
    depth = min(64 if itemsize <= 2 else 32, _tile_rows(len(left), len(segments.start), itemsize))
    tiles = _tiles(height, rights[0].shape[1], depth, itemsize=itemsize, widest=128 // len(rights))
    grid = (left.shape[1] // height, rights[0].shape[1] // tiles.columns, experts)
    results = [jax.ShapeDtypeStruct((experts, left.shape[1], each.shape[1]), like.dtype) for each in rights]
    return _call(kernel, tiles, grid, [*_by_expert(segments, experts), left, *rights], results)


def _call(
    kernel: Callable[..., None],
    tiles: ProductTiles,
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    results: Sequence[jax.ShapeDtypeStruct],
) -> Sequence[Array]:
    """Run a kernel that reads and writes whole arrays in the GPU's memory."""
    return pl.pallas_call(
        functools.partial(kernel, tiles),
        grid=grid,
        out_shape=list(results),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        name=kernel.__name__,
    )(*inputs)
