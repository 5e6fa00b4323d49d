"""Which cases of a long table `make test` takes; the others are marked long, and the continuous integration has them.

A table in which every case has something of its own stays whole: every scheme's equations. Where tests put one table
through another (every scheme through generation, every checkpoint through every converted form), most cases run the
same lines of code. There `make test` takes one for each thing that those lines tell apart.
"""

from collections.abc import Collection, Hashable, Iterable
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case", bound=Hashable)


def others_are_long(cases: Iterable[Case], quick: Collection[Case]) -> list[Any]:
    """All cases as pytest's parameters, in their order; those outside `quick` are marked long."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.long) for case in cases]


# One model of each kind, for tests to which it makes no difference where in a block norms stand: norms before and after
# sums, of several groups of layers, with scales that start at 0, of parallel branches, of two streams, on a sphere, and
# with branches that grow.
SCHEMES_OF_EACH_KIND = (
    *("pre", "post", "hybrid_star", "hybrid_rezero", "parallel", "siamese_post_pre", "ngpt", "prores_pre"),
)
# And for those that have code for each place: on heads, inside branches, around the block, on both streams.
SCHEMES_WITH_EACH_PLACE = (
    *SCHEMES_OF_EACH_KIND,
    *("qkc_post", "sub_ln", "normformer_residual", "b2t", "geonorm", "siamese_hybrid_pre", "span"),
)


def diagonal(rows: Collection[Any], columns: Collection[Any], apart: int) -> list[Any]:
    """All pairs as pytest's parameters; all are marked long but every `apart`th of each row and of each column."""
    return [
        pytest.param(row, column, id=f"{row}-{column}", marks=() if (down + right) % apart == 0 else pytest.mark.long)
        for down, row in enumerate(rows)
        for right, column in enumerate(columns)
    ]
