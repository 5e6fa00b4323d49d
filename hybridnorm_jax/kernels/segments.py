"""Segments: stretches of rows that belong to one expert each; and in which order a kernel visits them.

A grouped product has one group of rows for each expert, one after the other. Segments say more: an expert may have
several, and rows between them may belong to nobody. So rows that come from several devices need not be sorted again.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Segments(NamedTuple):
    """Rows start to end - 1 belong to `expert`. Segments are sorted by start and share no rows; they may be empty."""

    start: Int[Array, " segments"]
    end: Int[Array, " segments"]
    expert: Int[Array, " segments"]


def segments_of_groups(sizes: Int[Array, " experts"]) -> Segments:
    """One segment for each expert, one after the other."""
    end = jnp.cumsum(sizes.astype(jnp.int32))
    return Segments(start=end - sizes.astype(jnp.int32), end=end, expert=jnp.arange(len(sizes), dtype=jnp.int32))


def expert_of_rows(segments: Segments, rows: int, *, nobody: int) -> Int[Array, " rows"]:
    """The expert of each row; `nobody` for a row of no segment."""
    row = jnp.arange(rows)
    segment = jnp.searchsorted(segments.start, row, side="right") - 1  # of several that start here, the last has rows
    inside = (segment >= 0) & (row < segments.end[segment])
    return jnp.where(inside, segments.expert[segment], nobody)


class Visits(NamedTuple):
    """What a kernel does one after the other: each visit is of the part of one segment that lies in one tile of rows.

    Attributes:
      count: how many there are; the other arrays have room for more.
      tile: the number of the tile.
      expert, start, end: of the segment.
    """

    count: Int[Array, ""]
    tile: Int[Array, " visits"]
    expert: Int[Array, " visits"]
    start: Int[Array, " visits"]
    end: Int[Array, " visits"]


def visits_by_row(segments: Segments, rows: int, tile: int) -> Visits:
    """All visits in the order of their rows, so that those of one tile follow each other.

    Args:
      rows: how many there are, a multiple of `tile`.
      tile: rows of a tile.
    """
    return _visits(segments, rows, tile, of_empty=jnp.zeros_like(segments.start))


def visits_by_expert(segments: Segments, experts: int, rows: int, tile: int) -> Visits:
    """All visits in the order of their experts; an expert without rows has one visit, of an empty segment."""
    here = jnp.zeros(experts, bool).at[segments.expert].max(segments.end > segments.start)
    nothing = jnp.zeros(experts, jnp.int32)
    one_each = Segments(start=nothing, end=nothing, expert=jnp.arange(experts, dtype=jnp.int32))
    of_empty = jnp.concatenate([jnp.zeros_like(segments.start), jnp.where(here, 0, 1)])
    both = Segments(*(jnp.concatenate(pair) for pair in zip(segments, one_each, strict=True)))
    order = jnp.argsort(both.expert, stable=True)
    return _visits(Segments(*(array[order] for array in both)), rows, tile, of_empty=of_empty[order])


def _visits(segments: Segments, rows: int, tile: int, of_empty: Int[Array, " segments"]) -> Visits:
    """The visits of the segments in the order given; `of_empty` says how many an empty segment has."""
    start, end, expert = segments
    first = start // tile
    each = jnp.where(end > start, (end - 1) // tile - first + 1, of_empty).astype(jnp.int32)
    most = rows // tile + len(start)  # a tile is visited once more for each segment that begins within it
    segment = jnp.repeat(jnp.arange(len(start)), each, total_repeat_length=most)
    number = jnp.arange(most) - (jnp.cumsum(each) - each)[segment]
    tiles = jnp.clip(first[segment] + number, 0, rows // tile - 1).astype(jnp.int32)
    count = jnp.maximum(each.sum(), 1)  # where there are no rows at all, one visit of an empty segment
    return Visits(count, tiles, expert[segment], start[segment], end[segment])
