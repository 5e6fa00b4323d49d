"""The grouped product by kernels of our own for GPUs, in Pallas (Triton), forward and backward.

Rows are cut into tiles. A tile in which one group ends and another begins is visited once for each of them, and each
visit writes the rows of its own group alone. So there are at most `tiles + experts - 1` visits, however the rows are
distributed; programs beyond those that a step fills end at once. The gradient of an expert's kernel goes through the
tiles of its group. Nothing is added atomically, so that the same numbers give the same sums.

jax.experimental.pallas.ops.gpu.ragged_dot_mgpu would be an alternative, on Hopper alone, for 16-bit numbers alone and
for sizes that are multiples of its blocks; nobody has compared the two on a GPU yet.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.expert_rows import GroupSizes, Rows, pad_rows
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.kernels.swiglu import InputKernels

# Triton multiplies no matrix with a side below this one, and takes only powers of two.
SMALLEST = 16


class ProductTiles(NamedTuple):
    """How the kernels go through a product of (rows, inner) and (inner, columns).

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


def product_tiles(rows: int, inner: int, columns: int, *, groups: int, itemsize: int) -> ProductTiles:
    """Tiles that divide `inner` and `columns`, multiples of SMALLEST; rows no longer than the mean group needs.

    Not measured on a GPU: they were chosen by what XLA's compiler says of the kernels' memory and registers.
    """
    longest, widest, deepest = (128, 128, 64) if itemsize <= 2 else (64, 64, 32)
    mean_group = -(-rows // groups)
    height = SMALLEST
    while height < min(mean_group, longest):
        height *= 2
    width = _dividing(columns, widest)
    warps = 8 if height * width > 64 * 64 else 4
    return ProductTiles(height, width, _dividing(inner, deepest), warps, stages=3)


def _dividing(size: int, largest: int) -> int:
    """The largest power of two that divides `size`, at most `largest`."""
    return min(size & -size, largest)


@jax.custom_vjp
def gpu_grouped_product(rows: Rows, kernels: InputKernels, sizes: GroupSizes) -> Float[Array, "rows mlp"]:
    """rows_i kernels[e] in the dtype of rows, summed in float32; undefined for rows past the last group."""
    return _product(rows, kernels, sizes, transposed=False)


class _Residuals(NamedTuple):
    rows: Rows
    kernels: InputKernels
    sizes: GroupSizes


def _forward(rows: Rows, kernels: InputKernels, sizes: GroupSizes) -> tuple[Float[Array, "rows mlp"], _Residuals]:
    return gpu_grouped_product(rows, kernels, sizes), _Residuals(rows, kernels, sizes)


def _backward(residuals: _Residuals, d_out: Float[Array, "rows mlp"]) -> tuple[Rows, InputKernels, None]:
    rows, kernels, sizes = residuals
    return _product(d_out, kernels, sizes, transposed=True), _kernel_gradients(rows, d_out, sizes, kernels), None


gpu_grouped_product.defvjp(_forward, _backward)


def _product(rows: Array, kernels: Array, sizes: GroupSizes, *, transposed: bool) -> Array:
    """rows_i kernels[e], or rows_i kernels[e]^T."""
    count, (inner_axis, column_axis) = len(rows), (2, 1) if transposed else (1, 2)
    columns = kernels.shape[column_axis]
    kernels = _whole(_whole(kernels, 1), 2)
    inner, width = kernels.shape[inner_axis], kernels.shape[column_axis]
    tiles = product_tiles(count, inner, width, groups=len(kernels), itemsize=rows.dtype.itemsize)
    rows = _whole(pad_rows(rows, -count % tiles.rows), 1)
    visits = _visits(sizes, len(rows), tiles.rows)
    made = _call(
        functools.partial(grouped_product, tiles, transposed),
        grid=(width // tiles.columns, len(visits.expert)),
        inputs=[*visits, rows, kernels],
        result=jax.ShapeDtypeStruct((len(rows), width), rows.dtype),
        tiles=tiles,
    )
    return made[:count, :columns]


def _kernel_gradients(rows: Array, d_out: Array, sizes: GroupSizes, like: Array) -> Array:
    """rows_e^T d_out_e for the rows of each expert e."""
    experts, inner, columns = like.shape
    left, right = _whole(rows, 1), _whole(d_out, 1)
    # The sum runs over rows here, and the tile of the result is one of (inner, columns).
    tiles = product_tiles(1 << 30, SMALLEST, right.shape[1], groups=1, itemsize=rows.dtype.itemsize)
    height = _dividing(left.shape[1], tiles.rows)
    mean_group = -(-len(rows) // experts)
    depth = SMALLEST
    while depth < min(mean_group, 64 if rows.dtype.itemsize <= 2 else 32):
        depth *= 2
    tiles = tiles._replace(rows=height, inner=depth)
    padding = -len(rows) % depth
    left, right = pad_rows(left, padding), pad_rows(right, padding)
    made = _call(
        functools.partial(grouped_kernel_gradient, tiles),
        grid=(left.shape[1] // tiles.rows, right.shape[1] // tiles.columns, experts),
        inputs=[jnp.cumsum(sizes) - sizes, jnp.cumsum(sizes), left, right],
        result=jax.ShapeDtypeStruct((experts, left.shape[1], right.shape[1]), like.dtype),
        tiles=tiles,
    )
    return made[:, :inner, :columns]


def _whole(array: Array, axis: int) -> Array:
    """The array, its axis filled up with zeros to a multiple of SMALLEST."""
    missing = -array.shape[axis] % SMALLEST
    if not missing:
        return array
    filled = [(0, 0)] * array.ndim
    filled[axis] = (0, missing)
    return jnp.pad(array, filled)


class _Visits(NamedTuple):
    """Of each program: a tile of rows, and the part of it that belongs to one group; nothing where start = end.

    Attributes:
      tile: its number.
      expert: of the group.
      start, end: its first row, and one past its last one.
    """

    tile: Int[Array, " visits"]
    expert: Int[Array, " visits"]
    start: Int[Array, " visits"]
    end: Int[Array, " visits"]


def _visits(sizes: GroupSizes, rows: int, tile_rows: int) -> _Visits:
    """All visits of tiles by groups, in the order of the rows."""
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // tile_rows
    tiles_of_group = jnp.where(sizes > 0, (ends - 1) // tile_rows - first + 1, 0)
    visits_end = jnp.cumsum(tiles_of_group)
    number = jnp.arange(rows // tile_rows + len(sizes) - 1)
    expert = jnp.minimum(jnp.searchsorted(visits_end, number, side="right"), len(sizes) - 1)
    tile = first[expert] + number - (visits_end - tiles_of_group)[expert]
    there = number < visits_end[-1]
    visits = _Visits(
        tile=jnp.where(there, tile, 0),
        expert=expert,
        start=jnp.where(there, starts[expert], 0),
        end=jnp.where(there, ends[expert], 0),
    )
    return jax.tree.map(lambda numbers: numbers.astype(jnp.int32), visits)


def _call(
    kernel: Callable[..., None],
    *,
    grid: tuple[int, ...],
    inputs: list[Array],
    result: jax.ShapeDtypeStruct,
    tiles: ProductTiles,
) -> Array:
    """Run a kernel that reads and writes whole arrays in the GPU's memory."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=result,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        name=kernel.func.__name__,
    )(*inputs)


def _piece(number: Any, size: int) -> Any:
    return pl.dslice(number * size, size)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The product over a dimension of each, in float32 at least."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=wide_dtype(a.dtype))


def grouped_product(
    tiles: ProductTiles,
    transposed: bool,
    tile_ref: Any,
    expert_ref: Any,
    start_ref: Any,
    end_ref: Any,
    rows_ref: Any,
    kernels_ref: Any,
    out_ref: Any,
) -> None:
    """A tile of columns of one visit."""
    visit = pl.program_id(1)
    start, end, expert, tile = start_ref[visit], end_ref[visit], expert_ref[visit], tile_ref[visit]
    place, columns = _piece(tile, tiles.rows), _piece(pl.program_id(0), tiles.columns)

    @pl.when(start < end)
    def _() -> None:
        def add(number: Any, total: Array) -> Array:
            inner = _piece(number, tiles.inner)
            left = triton.load(rows_ref.at[place, inner])
            if transposed:
                return total + _dot(left, triton.load(kernels_ref.at[expert, columns, inner]), (1, 1))
            return total + _dot(left, triton.load(kernels_ref.at[expert, inner, columns]), (1, 0))

        nothing = jnp.zeros((tiles.rows, tiles.columns), wide_dtype(rows_ref.dtype))
        total = jax.lax.fori_loop(0, rows_ref.shape[1] // tiles.inner, add, nothing)
        positions = tile * tiles.rows + jnp.arange(tiles.rows)
        inside = ((positions >= start) & (positions < end))[:, None]
        triton.store(out_ref.at[place, columns], total.astype(out_ref.dtype), mask=inside)


def grouped_kernel_gradient(
    tiles: ProductTiles, start_ref: Any, end_ref: Any, rows_ref: Any, d_out_ref: Any, out_ref: Any
) -> None:
    """A tile of the gradient of one expert's kernel: the sum over the rows of its group."""
    expert = pl.program_id(2)
    start, end = start_ref[expert], end_ref[expert]
    height, width = _piece(pl.program_id(0), tiles.rows), _piece(pl.program_id(1), tiles.columns)

    def add(number: Any, total: Array) -> Array:
        place = _piece(number, tiles.inner)
        positions = number * tiles.inner + jnp.arange(tiles.inner)
        inside = ((positions >= start) & (positions < end))[:, None]
        # Both are masked: rows past the last group may hold NaN, and 0 * NaN is NaN.
        left = triton.load(rows_ref.at[place, height], mask=inside, other=0)
        right = triton.load(d_out_ref.at[place, width], mask=inside, other=0)
        return total + _dot(left, right, (0, 0))

    depth = jnp.asarray(tiles.inner, start.dtype)
    first, last = jax.lax.div(start, depth), jax.lax.div(end + depth - 1, depth)
    nothing = jnp.zeros((tiles.rows, tiles.columns), wide_dtype(rows_ref.dtype))
    total = jax.lax.fori_loop(first, jnp.where(start < end, last, first), add, nothing)
    triton.store(out_ref.at[expert, height, width], total.astype(out_ref.dtype))
