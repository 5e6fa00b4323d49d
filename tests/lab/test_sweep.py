"""The search for the best learning rate looks beyond an edge and between the points of its grid."""

import math

import pytest

from hybridnorm_jax.lab.groups import RunGroup
from hybridnorm_jax.lab.sweep import rounded, sweep

GRID = (1e-3, 2e-3, 4e-3)


def _bowl(best):
    """Losses by rate that are lowest at `best`; what was asked is noted."""
    asked = []

    def groups_at(rates):
        asked.extend(rates)
        return [RunGroup(losses={100: math.log(rate / best) ** 2}, diverged={}, unfinished=()) for rate in rates]

    return asked, groups_at


@pytest.mark.parametrize(
    ("optimum", "best", "tried", "edge"),
    [
        (2.2e-3, 2e-3, {*GRID, 1.41e-3, 2.83e-3}, None),
        (2.7e-3, 2.83e-3, {*GRID, 1.41e-3, 2.83e-3}, None),
        # At an edge the grid grows, by its own factor.
        (7e-3, 8e-3, {*GRID, 8e-3, 1.6e-2, 5.66e-3, 1.13e-2}, None),
        (4.4e-4, 5e-4, {*GRID, 5e-4, 2.5e-4, 7.07e-4, 3.54e-4}, None),
        # At most twice, and then what was found is said to lie at the edge.
        (1.0, 1.6e-2, {*GRID, 8e-3, 1.6e-2, 1.13e-2}, "largest"),
        (1e-9, 2.5e-4, {*GRID, 5e-4, 2.5e-4, 3.54e-4}, "smallest"),
    ],
)
def test_the_best_rate_is_found(optimum, best, tried, edge):
    asked, groups_at = _bowl(optimum)
    found = sweep(reversed(GRID), groups_at)
    assert (found.best, set(found.tried), found.edge) == (best, tried, edge)
    assert sorted(asked) == sorted(tried)  # nothing is trained twice


def test_a_scheme_that_diverges_everywhere_is_tried_below_and_has_no_best():
    found = sweep(GRID, lambda rates: [RunGroup(losses={}, diverged={100: 3}, unfinished=())] * len(rates))
    assert found.best is None
    assert found.tried == (2.5e-4, 5e-4, *GRID)


def test_a_rate_at_which_a_seed_diverged_is_not_best():
    def group_at(rate):
        survivors = {0: -rate} if rate > 2e-3 else {0: -rate, 1: -rate}
        return RunGroup(losses=survivors, diverged={1: 5} if rate > 2e-3 else {}, unfinished=())

    assert sweep(GRID, lambda rates: [group_at(rate) for rate in rates]).best == 2e-3


def test_rates_have_three_digits():
    assert rounded(math.sqrt(2) * 1e-3) == 1.41e-3
