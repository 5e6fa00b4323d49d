"""The search for the best learning rate of a scheme: a grid, beyond its edges, and between its points."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from hybridnorm_jax.config.limits import LARGEST_RATE, SMALLEST
from hybridnorm_jax.lab.groups import RunGroup, best_rate

# How often the grid grows where its best rate lies at its edge.
MOST_EXTENSIONS = 2
# Digits of a rate that was not asked for, so that the names of runs stay short.
DIGITS = 3


@dataclasses.dataclass(frozen=True)
class Swept:
    """What a search found.

    Attributes:
      best: the best of all rates that were tried; None where no run finished.
      tried: in rising order.
    """

    best: float | None
    tried: tuple[float, ...]

    @property
    def edge(self) -> str | None:
        """Whether the best is the "smallest" or the "largest" that was tried: a better one may lie beyond it."""
        if self.best == self.tried[0]:
            return "smallest"
        return "largest" if self.best == self.tried[-1] else None


def sweep(grid: Iterable[float], groups_at: Callable[[Sequence[float]], Sequence[RunGroup]]) -> Swept:
    """Search the best rate by the mean loss of the runs at each.

    The whole grid is tried. As long as the best is its smallest or largest rate, and at most twice, one more is tried
    beyond it, as far from it as its neighbor on the other side. Then the two rates half way to its neighbors are tried,
    by ratio: in a grid in factors of 2 they are sqrt(2) away.

    Args:
      groups_at: trains the runs at some rates, or finds them trained; returns those of each rate. It is asked for the
        whole grid, then for each rate beyond it, then for the two in between.
    """
    groups: dict[float, RunGroup] = {}

    def try_rates(rates: Sequence[float]) -> None:
        groups.update(zip(rates, groups_at(rates), strict=True))

    try_rates(sorted(grid))
    for _ in range(MOST_EXTENSIONS):
        beyond = _beyond(groups)
        if beyond is None:
            break
        try_rates([beyond])
    best = best_of(groups)
    if best is not None:
        try_rates(_between(sorted(groups), best))
    return Swept(best=best_of(groups), tried=tuple(sorted(groups)))


def best_of(groups: dict[float, RunGroup]) -> float | None:
    """The best rate of one scheme, see groups.best_rate."""
    return best_rate("", {("", rate): group for rate, group in groups.items()})


def _beyond(groups: dict[float, RunGroup]) -> float | None:
    """The rate to try beyond the edge at which the best one lies; where none finished, below the smallest."""
    tried = sorted(groups)
    best = best_of(groups)
    if best is None or best == tried[0]:
        rate = rounded(tried[0] * tried[0] / tried[1])
        return rate if rate >= SMALLEST else None
    if best == tried[-1]:
        rate = rounded(tried[-1] * tried[-1] / tried[-2])
        return rate if rate <= LARGEST_RATE else None
    return None


def _between(tried: list[float], best: float) -> list[float]:
    """The rates half way, by ratio, from the best one to its neighbors."""
    at = tried.index(best)
    neighbors = tried[max(0, at - 1) : at] + tried[at + 1 : at + 2]
    between = [rounded(math.sqrt(best * neighbor)) for neighbor in neighbors]
    return [rate for rate in between if rate not in tried]


def rounded(rate: float) -> float:
    """A rate with three digits."""
    return float(f"{rate:.{DIGITS}g}")
