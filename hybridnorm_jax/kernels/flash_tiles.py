"""The tiles that flash attention on a GPU works in, for the kernels and for the planner that counts. No JAX here."""

from typing import NamedTuple

# Triton multiplies no matrix with a side below this one, and takes only powers of two.
SMALLEST = 16


class Tiles(NamedTuple):
    """How one kernel goes through the scores.

    Attributes:
      rows, columns: queries and keys of one tile of scores.
      warps: of 32 threads, which compute one tile together.
      stages: how many tiles are on their way from memory at once.
    """

    rows: int
    columns: int
    warps: int
    stages: int


class AttentionTiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    d_query: Tiles
    d_key_value: Tiles

    @property
    def longest(self) -> int:
        """What positions are filled up to a multiple of; all sides are powers of two."""
        return max(max(each.rows, each.columns) for each in self)


def padded_head_dim(head_dim: int) -> int:
    """The power of two that holds a head."""
    return max(SMALLEST, 1 << (head_dim - 1).bit_length())


def attention_tiles(seq: int, head_dim: int, itemsize: int) -> AttentionTiles:
    """Tiles whose operands fit into the shared memory of an A100 and whose sums fit into the registers of an H100.

    Not measured on a GPU: they were chosen by what XLA's compiler says of each kernel's memory and registers. In
    float32 without TF32 (jax_default_matmul_precision=highest) some kernels have too few registers, and are slow.

    Args:
      seq: the smaller one of the numbers of queries and keys.
      itemsize: bytes of a number of the query.
    """
    width = padded_head_dim(head_dim) * itemsize
    longest = max(SMALLEST, 1 << (seq - 1).bit_length())

    def tiles(rows: int, columns: int, warps: int, stages: int) -> Tiles:
        return Tiles(min(rows, longest), min(columns, longest), warps, stages)

    if width <= 128 and itemsize <= 2:
        return AttentionTiles(tiles(128, 64, 4, 3), tiles(128, 64, 8, 2), tiles(128, 64, 8, 2))
    if width <= 256 and itemsize <= 2:
        return AttentionTiles(tiles(128, 64, 8, 2), tiles(128, 64, 8, 2), tiles(64, 64, 8, 2))
    if width <= 512:
        return AttentionTiles(tiles(64, 32, 8, 2), tiles(64, 32, 8, 2), tiles(32, 64, 8, 2))
    return AttentionTiles(tiles(32, 16, 8, 1), tiles(32, 16, 8, 1), tiles(16, 32, 8, 1))


def visited_pairs(queries: int, keys: int, tiles: Tiles) -> int:
    """Pairs of a query and a key in all tiles that one head visits where all positions are in one segment.

    Fewer queries than keys are a stretch of a split sequence. All devices' stretches together are balanced, so that
    each counts half of its pairs.
    """
    if queries != keys:
        return queries * keys // 2
    columns = (min(start + tiles.rows, keys) for start in range(0, queries, tiles.rows))
    return sum(-(-each // tiles.columns) for each in columns) * tiles.rows * tiles.columns
