"""Which cases of a long table `make test` takes; the others are marked long, and the continuous integration has them.

A table in which every case has something of its own stays whole. Where tests put one table through another (every
scheme through generation, every checkpoint through every converted form), most cases run the same lines of code. There
`make test` takes so many that every value of every key is in one of them.
"""

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import pytest

import hybridnorm_jax as hn

Case = TypeVar("Case", bound=Hashable)


def others_are_long(cases: Iterable[Case], quick: Collection[Case]) -> list[Any]:
    """All cases as pytest's parameters, in their order; those outside `quick` are marked long."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.long) for case in cases]


def covering(facts: Mapping[Case, Collection[Hashable]]) -> list[Case]:
    """The cases that have a fact which no case before them has: together they have all.

    Args:
      facts: of each case.
    """
    seen: set[Hashable] = set()
    taken = []
    for case, own in facts.items():
        if not seen.issuperset(own):
            taken.append(case)
            seen |= set(own)
    return taken


def facts_of_scheme(name: str) -> set[tuple[str, Hashable]]:
    """What a scheme's layers have, of a model of four: each field of their placements with its value, and the rest."""
    scheme = hn.SCHEMES[name]
    placements = scheme.placements(4)
    facts = {("final_norm", scheme.final_norm), ("embedding_norm", scheme.embedding_norm)}
    facts |= {("structures", len({placement.structure for placement in placements}))}
    return facts.union(*(_fields(placement) for placement in placements))


def _fields(part: Any, inside: str = "") -> Iterable[tuple[str, Hashable]]:
    """Of dataclasses within dataclasses, by path. Of a number counts whether it is 1, as scales usually are."""
    for field in dataclasses.fields(part):
        value, path = getattr(part, field.name), f"{inside}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{path}.")
        else:
            yield path, value == 1.0 if isinstance(value, float) else value


QUICK_SCHEMES = covering({name: facts_of_scheme(name) for name in hn.SCHEMES})


def diagonal(rows: Collection[Any], columns: Collection[Any], apart: int) -> list[Any]:
    """All pairs as pytest's parameters; all are marked long but every `apart`th of each row and of each column."""
    return [
        pytest.param(row, column, id=f"{row}-{column}", marks=() if (down + right) % apart == 0 else pytest.mark.long)
        for down, row in enumerate(rows)
        for right, column in enumerate(columns)
    ]
