"""Runs of one label at one learning rate as a group: their final losses by seed, and the best rate of a label."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED, Point
from hybridnorm_jax.lab.runs import Run

# Stands for a validation set where there is none: the training loss is compared.
TRAINING = "training"


@dataclasses.dataclass(frozen=True)
class RunGroup:
    """All runs of one label at one learning rate.

    Attributes:
      losses: seed -> final loss of the runs that finished.
      diverged: seed -> the step at which its run diverged; None where that is unknown.
      unfinished: seeds of the other runs.
    """

    losses: dict[int, float]
    diverged: dict[int, int | None]
    unfinished: tuple[int, ...]

    @property
    def seeds(self) -> set[int]:
        """The seeds of all runs."""
        return set(self.losses) | set(self.diverged) | set(self.unfinished)

    @property
    def mean(self) -> float | None:
        """Mean of the losses; None where no run finished."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the losses over seeds (divided by n - 1); None below two seeds."""
        return float(np.std(list(self.losses.values()), ddof=1)) if len(self.losses) > 1 else None


# (label, learning rate) -> its runs.
Groups = Mapping[tuple[str, float], RunGroup]


def measured_set(runs: Sequence[Run]) -> str:
    """The validation set whose loss is compared.

    It is "validation" if all finished runs have it, else the first in the alphabet that they all have. Where there is
    none it is TRAINING: the mean training loss of the last steps.
    """
    return compared_set([set(run.scores) for run in runs if run.status == FINISHED])


def compared_set(sets: Sequence[set[str]]) -> str:
    """measured_set of the validation sets that each finished run has."""
    shared = set.intersection(*sets) if sets else set()
    return "validation" if "validation" in shared else min(shared, default=TRAINING)


def final_loss(run: Run, measured: str) -> float | None:
    """The loss that is compared, in nats per token; None unless the run finished."""
    if run.status != FINISHED:
        return None
    if measured != TRAINING:
        return run.scores[measured]
    last_step = np.array([run.config.train.steps])
    (loss,) = smoothed(run.losses, last_step, window=smoothing_window(run))
    return float(loss) if math.isfinite(loss) else None


def group_runs(runs: Iterable[Run], measured: str) -> dict[tuple[str, float], RunGroup]:
    """(label, learning rate) -> its runs."""
    members: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        members.setdefault((run.label, run.rate), []).append(run)
    return {key: _group(mine, measured) for key, mine in members.items()}


def _group(runs: Sequence[Run], measured: str) -> RunGroup:
    losses, diverged, unfinished = {}, {}, []
    for run in runs:
        loss = final_loss(run, measured)
        if loss is not None:
            losses[run.seed] = loss
        elif run.status == DIVERGED:
            diverged[run.seed] = run.diverged_at
        else:
            unfinished.append(run.seed)
    return RunGroup(losses=losses, diverged=diverged, unfinished=tuple(unfinished))


def best_rate(label: str, groups: Groups) -> float | None:
    """The learning rate with the lowest mean loss, of those with the most finished seeds, then the fewest diverged.

    A rate at which runs diverge is not best for the losses of the runs that happened to survive. None where no run
    of the label finished.
    """
    mine = {rate: group for (name, rate), group in groups.items() if name == label and group.losses}

    def order(rate: float) -> tuple[int, int, float]:
        group = mine[rate]
        return -len(group.losses), len(group.diverged), group.mean

    return min(mine, key=order, default=None)


def smoothing_window(run: Run) -> int:
    """How many steps a smoothed training loss is the mean of: a fiftieth of the run."""
    return max(1, run.config.train.steps // 50)


def smoothed(series: Sequence[Point], at: Int[np.ndarray, "points"], *, window: int) -> Float[np.ndarray, "points"]:
    """The mean of the series' finite values of steps s - window + 1 to s, for each step s; NaN where there are none.

    Args:
      series: in the order of steps.
      at: the steps s.
    """
    finite = [point for point in series if math.isfinite(point.value)]
    steps = np.array([point.step for point in finite], dtype=np.int64)
    sums = np.concatenate([[0.0], np.cumsum([point.value for point in finite], dtype=np.float64)])
    first = np.searchsorted(steps, at - window, side="right")
    last = np.searchsorted(steps, at, side="right")
    counts = last - first
    return np.where(counts > 0, (sums[last] - sums[first]) / np.maximum(counts, 1), np.nan)
