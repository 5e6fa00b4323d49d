"""Learning-rate sensitivity: how much worse a label is where its learning rate is not the best one."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from hybridnorm_jax.lab.groups import RunGroup
from hybridnorm_jax.lab.report.blocks import Cell, Column, Table
from hybridnorm_jax.lab.report.columns import LABEL, numbers, shown
from hybridnorm_jax.lab.report.formats import rate_text, signed_text
from hybridnorm_jax.lab.report.statistics import ComparedRuns

# Multiples of the best rate that the table shows, and how far from one a rate may lie to stand for it.
FACTORS = (0.25, 0.5, 2.0, 4.0)
NEAR = math.sqrt(2)
WITHIN = 4.0
# Rates are rounded when they are written: 1.4e-3 stands for sqrt(2) times 1e-3.
ROUNDING = 1.02


@dataclasses.dataclass(frozen=True)
class OffBest:
    """The runs of a label at another rate than its best.

    Attributes:
      rate: the learning rate.
      increase: mean over the seeds that finished at both rates of loss at this rate - loss at the best, in nats; None
        where there is no such seed.
      diverged, ended: how many runs diverged at this rate, and how many finished or diverged.
    """

    rate: float
    increase: float | None
    diverged: int
    ended: int

    @property
    def severity(self) -> float:
        """What orders rates from good to bad: the increase, and infinity where a run diverged."""
        return math.inf if self.diverged else -math.inf if self.increase is None else self.increase


def off_best(groups: Mapping[float, RunGroup], best: float) -> list[OffBest]:
    """Every other rate than the best at which a run finished or diverged, in rising order.

    Args:
      groups: learning rate -> the runs of one label.
      best: one of these rates.
    """
    found = []
    for rate, group in sorted(groups.items()):
        ended = len(group.losses) + len(group.diverged)
        if rate != best and ended:
            shared = group.losses.keys() & groups[best].losses.keys()
            increases = [group.losses[seed] - groups[best].losses[seed] for seed in sorted(shared)]
            increase = float(np.mean(increases)) if increases else None
            found.append(OffBest(rate=rate, increase=increase, diverged=len(group.diverged), ended=ended))
    return found


def near(found: list[OffBest], target: float) -> OffBest | None:
    """The runs at the rate nearest to a target, by ratio, if it lies within a factor of sqrt(2); else None."""
    nearest = min(found, key=lambda each: abs(math.log(each.rate / target)), default=None)
    return nearest if nearest is not None and _is_within(nearest.rate, target, NEAR) else None


def worst_within(found: list[OffBest], best: float) -> OffBest | None:
    """The worst rate within a factor of WITHIN of the best; None where no other rate in it was tried."""
    inside = [each for each in found if _is_within(each.rate, best, WITHIN)]
    return max(inside, key=lambda each: each.severity, default=None)


def _is_within(rate: float, target: float, factor: float) -> bool:
    return abs(math.log(rate / target)) <= math.log(factor * ROUNDING)


def sensitivity_table(compared: ComparedRuns) -> Table | None:
    """How much worse each label is beside its best learning rate; None where no label was tried at two rates."""
    rows = []
    for label in compared.labels:
        best = compared.best[label]
        if best is None:
            continue
        mine = {rate: group for (name, rate), group in compared.choosing_groups.items() if name == label}
        found = off_best(mine, best)
        if found:
            cells = [_cell(near(found, factor * best), factor * best) for factor in FACTORS]
            inside = [each.rate / best for each in found if _is_within(each.rate, best, WITHIN)]
            tried = f"{min(1.0, *inside):.3g} to {max(1.0, *inside):.3g}" if inside else "none"
            rows.append([label, shown(best, rate_text), *cells, _cell(worst_within(found, best), None), tried])
    if not rows:
        return None
    return Table(
        "sensitivity",
        "Learning-rate sensitivity: by how many nats the mean loss is above that at the best rate",
        [
            LABEL,
            *numbers("best rate", "at 1/4 of it", "at 1/2", "at 2 times", "at 4 times"),
            *numbers("worst within a factor of 4"),
            Column("multiples tried"),
        ],
        rows,
    )


def _cell(found: OffBest | None, target: float | None) -> Cell:
    """A cell of the table; it names the rate where that is not the target."""
    if found is None:
        return Cell("not run")
    place = "" if target is not None and _is_within(found.rate, target, 1.0) else f" at {rate_text(found.rate)}"
    if found.diverged:
        return Cell(f"{found.diverged} of {found.ended} diverged{place}", failed=True, value=found.increase)
    if found.increase is None:
        return Cell(f"no seed at both rates{place}")
    return Cell(f"{signed_text(found.increase)}{place}", value=found.increase)
