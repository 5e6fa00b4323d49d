"""TPU kernels (Pallas) of rows in segments: what fetches the blocks of every visit, and writes what comes of it.

Megablox (tpu_gmm.py) multiplies and no more. Here a kernel may do with a product row by row what it wants, before the
product leaves the core: an elementwise pass of its own would write and read all rows once more.

Rows of no segment are undefined in every result, and are not looked at, whatever they hold.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.kernels.segments import Visits

LANES = 128
# Of a core's memory (64 MiB on a v5p, 128 MiB on a v5e and v6e): what the blocks of a kernel may take, and what the
# kernel may use together with what the compiler adds.
BLOCK_BYTES, LIMIT = 32 * 2**20, 56 * 2**20
# For where a kernel runs without a TPU: pl.pallas_call that interprets it.
pallas_call = pl.pallas_call


class Place(NamedTuple):
    """The visit at which a kernel is: the arrays of all visits, the rows of a tile, and the visit's number."""

    tile: Any
    start: Any
    end: Any
    rows: int
    number: Array

    def inside(self, row: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether these rows, counted within the tile, belong to the segment."""
        row = row + self.tile[self.number] * self.rows
        return (row >= self.start[self.number]) & (row < self.end[self.number])

    def column(self) -> Bool[Array, "rows 1"]:
        """`inside` of all rows of the tile."""
        return self.inside(jax.lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0))

    def write(self, result: Any, value: Array) -> None:
        """Write the segment's rows of a tile; the others keep what earlier visits wrote."""
        result[...] = jnp.where(self.column(), value.astype(result.dtype), result[...])


def channel_block(size: int, *, bytes_of_channel: int, other_bytes: int) -> int:
    """How many of `size` channels a block has: a divisor in whole lanes, so that everything fits into a core.

    At least two blocks, where that goes: a v5p shares them among its two cores. Blocks count twice, because the next
    ones are fetched meanwhile.

    Args:
      bytes_of_channel: that one more channel takes in all blocks.
      other_bytes: of blocks without this dimension.
    """
    lanes = size // LANES
    divisors = [count * LANES for count in range(1, lanes + 1) if lanes % count == 0]
    fitting = [block for block in divisors if 2 * (other_bytes + block * bytes_of_channel) <= BLOCK_BYTES]
    return max([block for block in fitting if block < size] or fitting or [LANES])


class Block(NamedTuple):
    """An array, or the shape of a result, and its block at (number of the channels' block, tile, expert)."""

    array: Any
    shape: tuple[int | None, ...]
    index: Callable[[Any, Any, Any], tuple]


def visit_rows(
    kernel: Callable[..., None],
    visits: Visits,
    *,
    operands: Sequence[Block],
    results: Sequence[Block],
    tile: int,
    channel_blocks: int,
    name: str,
) -> list[Array]:
    """Run kernel(place, *blocks of operands, *blocks of results) for every block of channels and every visit.

    Args:
      visits: by row.
      tile: rows of a tile.
    """

    def body(tiles: Any, experts: Any, start: Any, end: Any, *blocks: Any) -> None:
        kernel(Place(tiles, start, end, tile, pl.program_id(1)), *blocks)

    def spec(block: Block) -> pl.BlockSpec:
        def index(channels: Any, visit: Any, tiles: Any, experts: Any, start: Any, end: Any) -> tuple:
            return block.index(channels, tiles[visit], experts[visit])

        return pl.BlockSpec(block.shape, index)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(channel_blocks, visits.count),
        in_specs=[spec(block) for block in operands],
        out_specs=[spec(block) for block in results],
    )
    call = pallas_call(
        body,
        grid_spec=grid,
        out_shape=[block.array for block in results],
        compiler_params=_parameters("parallel", "arbitrary"),
        name=name,
    )
    return call(*visits[1:], *(block.array for block in operands))


def sums_of_outer_products(
    left: Float[Array, "rows inputs"],
    rights: Sequence[Float[Array, "rows outputs"]],
    visits: Visits,
    *,
    experts: int,
    tile: int,
    name: str,
) -> list[Float[Array, "experts inputs outputs"]]:
    """For each of `rights` and each expert the sum of left_i^T right_i over the expert's rows; zero without rows.

    The sums run in float32 and are returned in the dtype of `left`.

    Args:
      visits: by expert.
      tile: rows of a tile.
    """
    inputs, outputs, count, size = left.shape[1], rights[0].shape[1], len(rights), left.dtype.itemsize
    columns = next(block for block in (outputs, 2048, 1024, 512, 256, LANES) if block <= 2048 and outputs % block == 0)
    of_channel = tile * size + count * columns * (size + 4)  # of the sums and of a product there is but one block
    rows = channel_block(inputs, bytes_of_channel=of_channel, other_bytes=count * tile * columns * size)

    def spec(shape: tuple, index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(
            shape, lambda i, j, visit, tile, expert, start, end: index(i, j, tile[visit], expert[visit])
        )

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(inputs // rows, outputs // columns, visits.count),
        in_specs=[
            spec((tile, rows), lambda i, j, tile, expert: (tile, i)),
            *[spec((tile, columns), lambda i, j, tile, expert: (tile, j))] * count,
        ],
        out_specs=[spec((None, rows, columns), lambda i, j, tile, expert: (expert, i, j))] * count,
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)] * count,
    )
    call = pallas_call(
        _add_outer_products,
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((experts, inputs, outputs), left.dtype)] * count,
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        name=name,
    )
    return call(*visits[1:], left, *rights)


def _add_outer_products(tile: Any, expert: Any, start: Any, end: Any, left: Any, *blocks: Any) -> None:
    """One visit's part of the sums of an expert."""
    count = len(blocks) // 3
    rights, results, sums = blocks[:count], blocks[count : 2 * count], blocks[2 * count :]
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    here = expert[visit]
    begins = (visit == 0) | (expert[jnp.maximum(visit - 1, 0)] != here)
    ends = (visit == last) | (expert[jnp.minimum(visit + 1, last)] != here)
    inside = Place(tile, start, end, left.shape[0], visit).column()
    # Both sides, as what lies outside may be NaN.
    rows = jnp.where(inside, left[...], 0)
    for right, result, total in zip(rights, results, sums, strict=True):

        @pl.when(begins)
        def _(total: Any = total) -> None:
            total[...] = jnp.zeros_like(total)

        of_right = jnp.where(inside, right[...], 0)
        over_rows = (((0,), (0,)), ((), ()))
        total[...] += jax.lax.dot_general(rows, of_right, over_rows, preferred_element_type=jnp.float32)

        @pl.when(ends)
        def _(total: Any = total, result: Any = result) -> None:
            result[...] = total[...].astype(result.dtype)


def _parameters(*semantics: str) -> Any:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=LIMIT)
