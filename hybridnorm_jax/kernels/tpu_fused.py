"""The experts in five TPU kernels (Pallas): products with what is done to them row by row, forward and backward.

Forward of a row x with the kernels G, U, D (gate, up, down) of its expert and its weight w:

    h = w silu(x G) (x U)     one kernel; x G and x U stay in the core
    y = h D                   one kernel

Backward, where nothing but x, w and the kernels has been kept:

    x G, x U, dy D^T -> dg, du, h, dw    one kernel, see swiglu.swiglu_gradients
    dx = dg G^T + du U^T                 one kernel
    dG = sum x^T dg, dU = sum x^T du     one kernel
    dD = sum h^T dy                      one kernel

Not measured on a TPU. Counted in the compiled step, see docs/moe.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.expert_rows import Rows, pad_rows
from hybridnorm_jax.kernels.segments import Segments, visits_by_expert, visits_by_row
from hybridnorm_jax.kernels.swiglu import ExpertKernels, swiglu_gradients
from hybridnorm_jax.kernels.tpu_visits import (
    BLOCK_BYTES,
    LANES,
    Block,
    Place,
    channel_block,
    sums_of_outer_products,
    visit_rows,
)

RowWeights = Float[Array, " rows"]


def fits(embed: int, mlp: int, dtype: Any) -> bool:
    """Whether the smallest blocks of experts of this size fit into a core's memory."""
    return _fits(embed, mlp, jnp.dtype(dtype).itemsize, tile=LANES)


def _fits(embed: int, mlp: int, size: int, tile: int) -> bool:
    """Whether the blocks of this many rows fit; of the two kernels that need the most."""
    embed, mlp = _whole_lanes(embed), _whole_lanes(mlp)
    of_hidden = 2 * tile * embed * size + LANES * _backward_bytes_of_channel(embed, tile, size)
    of_rows = 2 * tile * mlp * size + LANES * _summed_bytes_of_channel(2 * mlp, tile, size)
    return 2 * max(of_hidden, of_rows) <= BLOCK_BYTES


def fused(rows: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels) -> Rows:
    """expert_dispatch.apply_grouped_experts for rows in segments; rows of none are undefined.

    They are undefined in the gradient of rows and of row_weights too, and nothing of them, of their weights or
    cotangents reaches another gradient.
    """
    count, embed = rows.shape
    mlp = kernels.gate.shape[2]
    tile = _tile_rows(count, len(segments.start), embed, mlp, rows.dtype.itemsize)
    more_embed, more_mlp = _whole_lanes(embed) - embed, _whole_lanes(mlp) - mlp
    if more_embed or more_mlp:
        into_mlp = ((0, 0), (0, more_embed), (0, more_mlp))
        rows = jnp.pad(rows, ((0, 0), (0, more_embed)))
        kernels = kernels.replace(
            gate=jnp.pad(kernels.gate, into_mlp),
            up=jnp.pad(kernels.up, into_mlp),
            down=jnp.pad(kernels.down, ((0, 0), (0, more_mlp), (0, more_embed))),
        )
    rows, row_weights = pad_rows(rows, -count % tile), pad_rows(row_weights, -count % tile)
    return _fused(rows, row_weights, segments, kernels, tile)[:count, :embed]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(rows: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels, tile: int) -> Rows:
    hidden = _hidden(rows, row_weights, segments, kernels, tile)
    return _summed_products([hidden], [kernels.down], segments, tile, transposed=False)


class _Residuals(NamedTuple):
    rows: Rows
    row_weights: RowWeights
    segments: Segments
    kernels: ExpertKernels


def _forward(
    rows: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels, tile: int
) -> tuple[Rows, _Residuals]:
    return _fused(rows, row_weights, segments, kernels, tile), _Residuals(rows, row_weights, segments, kernels)


def _backward(tile: int, residuals: _Residuals, d_outputs: Rows) -> tuple[Rows, RowWeights, None, ExpertKernels]:
    rows, row_weights, segments, kernels = residuals
    d_gated, d_upped, hidden, d_weights = _hidden_gradients(rows, d_outputs, row_weights, segments, kernels, tile)
    d_rows = _summed_products([d_gated, d_upped], [kernels.gate, kernels.up], segments, tile, transposed=True)
    experts = len(kernels.gate)
    visits = visits_by_expert(segments, experts, len(rows), tile)
    outer = functools.partial(sums_of_outer_products, visits=visits, experts=experts, tile=tile)
    d_gate, d_up = outer(rows, [d_gated, d_upped], name="experts_d_input_kernels")
    (d_down,) = outer(hidden, [d_outputs], name="experts_d_output_kernels")
    return d_rows, d_weights.astype(row_weights.dtype), None, kernels.replace(gate=d_gate, up=d_up, down=d_down)


_fused.defvjp(_forward, _backward)


def _hidden(
    rows: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels, tile: int
) -> Float[Array, "rows mlp"]:
    """h of every row, in the dtype of rows, as are x G and x U."""
    embed, mlp = kernels.gate.shape[1:]
    size = rows.dtype.itemsize
    of_channel = 2 * embed * size + tile * (size + 3 * 4 // 2)  # intermediate results are there once
    channels = channel_block(mlp, bytes_of_channel=of_channel, other_bytes=tile * embed * size)

    def kernel(place: Place, x: Any, weights: Any, gate: Any, up: Any, hidden: Any) -> None:
        gated, upped = _rounded_product(x, gate), _rounded_product(x, up)
        place.write(hidden, _column(weights[...]) * (jax.nn.silu(gated) * upped))

    (hidden,) = visit_rows(
        kernel,
        visits_by_row(segments, len(rows), tile),
        operands=[
            _whole(rows, tile),
            _in_tiles(row_weights, tile),
            _columns_of_kernel(kernels.gate, channels),
            _columns_of_kernel(kernels.up, channels),
        ],
        results=[_split(_like(rows, mlp), tile, channels)],
        tile=tile,
        channel_blocks=mlp // channels,
        name="experts_hidden",
    )
    return hidden


def _hidden_gradients(
    rows: Rows, d_outputs: Rows, row_weights: RowWeights, segments: Segments, kernels: ExpertKernels, tile: int
) -> tuple[Array, Array, Array, RowWeights]:
    """(dg, du, h, dw) of every row."""
    embed, mlp = kernels.gate.shape[1:]
    size = rows.dtype.itemsize
    of_channel = _backward_bytes_of_channel(embed, tile, size)
    channels = channel_block(mlp, bytes_of_channel=of_channel, other_bytes=2 * tile * embed * size)

    def kernel(place: Place, x: Any, d_output: Any, weights: Any, gate: Any, up: Any, down: Any, *results: Any) -> None:
        gated, upped = _rounded_product(x, gate), _rounded_product(x, up)
        d_weighted = _product(d_output[...], down[...], transposed=True)
        gradients = swiglu_gradients(gated, upped, _column(weights[...]), d_weighted)
        d_gated, d_upped, hidden, d_weights = results
        place.write(d_gated, gradients.gated)
        place.write(d_upped, gradients.upped)
        place.write(hidden, gradients.hidden)
        row = LANES * _iota(d_weights.shape, 0) + _iota(d_weights.shape, 1)
        d_weights[...] = jnp.where(place.inside(row), _in_lanes(gradients.weights), d_weights[...])

    blocks, result = mlp // channels, _split(_like(rows, mlp), tile, channels)
    # Each block of channels has its own part of dw.
    parts = jax.ShapeDtypeStruct((blocks, len(rows) // tile, tile // LANES, LANES), jnp.float32)
    of_tile = Block(parts, (None, None, tile // LANES, LANES), lambda channels, tile, expert: (channels, tile, 0, 0))
    d_gated, d_upped, hidden, d_weights = visit_rows(
        kernel,
        visits_by_row(segments, len(rows), tile),
        operands=[
            _whole(rows, tile),
            _whole(d_outputs, tile),
            _in_tiles(row_weights, tile),
            _columns_of_kernel(kernels.gate, channels),
            _columns_of_kernel(kernels.up, channels),
            _rows_of_kernel(kernels.down, channels),
        ],
        results=[result, result, result, of_tile],
        tile=tile,
        channel_blocks=blocks,
        name="experts_d_hidden",
    )
    return d_gated, d_upped, hidden, d_weights.sum(0).reshape(-1)


def _summed_products(
    lefts: list[Array], kernels: list[Array], segments: Segments, tile: int, *, transposed: bool
) -> Rows:
    """The sum of left_i kernel[e], or left_i kernel[e]^T, over the pairs, for every row i."""
    size, contracted = lefts[0].dtype.itemsize, lefts[0].shape[1]
    outputs = kernels[0].shape[1 if transposed else 2]
    of_channel = _summed_bytes_of_channel(len(lefts) * contracted, tile, size)
    other = len(lefts) * tile * contracted * size
    channels = channel_block(outputs, bytes_of_channel=of_channel, other_bytes=other)

    def kernel(place: Place, *blocks: Any) -> None:
        *operands, result = blocks
        pairs = zip(operands[: len(lefts)], operands[len(lefts) :], strict=True)
        place.write(result, sum(_product(left[...], right[...], transposed=transposed) for left, right in pairs))

    of_kernel = _rows_of_kernel if transposed else _columns_of_kernel
    (summed,) = visit_rows(
        kernel,
        visits_by_row(segments, len(lefts[0]), tile),
        operands=[*(_whole(left, tile) for left in lefts), *(of_kernel(each, channels) for each in kernels)],
        results=[_split(_like(lefts[0], outputs), tile, channels)],
        tile=tile,
        channel_blocks=outputs // channels,
        name="experts_d_rows" if transposed else "experts_outputs",
    )
    return summed


def _backward_bytes_of_channel(embed: int, tile: int, size: int) -> int:
    """What one channel of the hidden layer takes in _hidden_gradients, of intermediate results half."""
    return 3 * embed * size + tile * (3 * size + 6 * 4 // 2)


def _summed_bytes_of_channel(contracted: int, tile: int, size: int) -> int:
    """What one channel of the result takes in _summed_products, of intermediate results half."""
    return contracted * size + tile * (size + 2 * 4 // 2)


def _tile_rows(rows: int, segments: int, embed: int, mlp: int, size: int) -> int:
    """Rows of a tile: few against the mean segment, because a tile that segments share is computed for each."""
    short = (tile for tile in (1024 // size, 256) if 4 * tile * segments <= rows)
    return next((tile for tile in short if _fits(embed, mlp, size, tile)), LANES)


def _whole_lanes(size: int) -> int:
    """The multiple of LANES that holds `size`."""
    return LANES * -(-size // LANES)


def _like(rows: Rows, channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(rows), channels), rows.dtype)


def _whole(rows: Array, tile: int) -> Block:
    return Block(rows, (tile, rows.shape[1]), lambda channels, tile, expert: (tile, 0))


def _split(rows: Any, tile: int, channels: int) -> Block:
    return Block(rows, (tile, channels), lambda channels, tile, expert: (tile, channels))


def _columns_of_kernel(kernel: Array, channels: int) -> Block:
    return Block(kernel, (None, kernel.shape[1], channels), lambda channels, tile, expert: (expert, 0, channels))


def _rows_of_kernel(kernel: Array, channels: int) -> Block:
    return Block(kernel, (None, channels, kernel.shape[2]), lambda channels, tile, expert: (expert, channels, 0))


def _in_tiles(row_weights: RowWeights, tile: int) -> Block:
    """The weights as rows of lanes: a column of them would take 128 times the memory."""
    tiles = row_weights.astype(jnp.float32).reshape(-1, tile // LANES, LANES)
    return Block(tiles, (None, *tiles.shape[1:]), lambda channels, tile, expert: (tile, 0, 0))


def _product(left: Array, right: Array, *, transposed: bool = False) -> Array:
    """left right, or left right^T, in float32."""
    contracted = ((1,), (1 if transposed else 0,))
    return jax.lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _rounded_product(left: Any, right: Any) -> Array:
    """left right in float32, rounded to the dtype of left."""
    return _product(left[...], right[...]).astype(left.dtype).astype(jnp.float32)


def _iota(shape: tuple[int, ...], dimension: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, dimension)


def _column(lanes: Float[Array, "groups lanes"]) -> Float[Array, "rows 1"]:
    """All numbers under each other."""
    diagonal = _iota((LANES, LANES), 0) == _iota((LANES, LANES), 1)
    groups = (jnp.where(diagonal, lanes[i : i + 1], 0) for i in range(len(lanes)))
    return jnp.concatenate([group.sum(1, keepdims=True) for group in groups])


def _in_lanes(column: Float[Array, "rows 1"]) -> Float[Array, "groups lanes"]:
    """The inverse of _column."""
    diagonal = _iota((LANES, LANES), 0) == _iota((LANES, LANES), 1)
    groups = (jnp.where(diagonal, column[i : i + LANES], 0) for i in range(0, len(column), LANES))
    return jnp.concatenate([group.sum(0, keepdims=True) for group in groups])
