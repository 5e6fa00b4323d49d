"""The numbers of a comparison: means over seeds, paired differences, best learning rates, smoothing, spikes."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from hybridnorm_jax.lab.runs import DIVERGED, FINISHED, UNFINISHED, Run
from hybridnorm_jax.training.spikes import SpikeScore

TRAINING = "training"


@dataclasses.dataclass(frozen=True)
class Cell:
    """All runs of one label at one learning rate.

    Attributes:
      losses: seed -> final loss of the runs that finished.
      diverged: seed -> the step, or None where that is unknown.
      unfinished: seeds.
    """

    losses: dict[int, float]
    diverged: dict[int, int | None]
    unfinished: tuple[int, ...]

    @property
    def mean(self) -> float | None:
        """Of the losses; None where no run finished."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds (divided by n - 1); None below two."""
        return float(np.std(list(self.losses.values()), ddof=1)) if len(self.losses) > 1 else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two labels' losses, over the seeds that both finished.

    Attributes:
      mean: of (loss - baseline's loss) over seeds; below 0 the label is better.
      half_width: of the confidence interval mean +- half_width; None with one seed.
      seeds: those that were paired.
      left_out: how many seeds either had without a loss of both.
    """

    mean: float
    half_width: float | None
    seeds: tuple[int, ...]
    left_out: int


def measured_set(runs: Sequence[Run]) -> str:
    """The validation set whose loss is compared: "validation" if all finished runs have it, else the first they share.

    "training" (the mean training loss of the last steps) where they share none.
    """
    finished = [set(run.scores) for run in runs if run.status == FINISHED]
    shared = set.intersection(*finished) if finished else set()
    return "validation" if "validation" in shared else min(shared, default=TRAINING)


def final_loss(run: Run, measured: str) -> float | None:
    """Nats per token; None unless the run finished."""
    if run.status != FINISHED:
        return None
    if measured != TRAINING:
        return run.scores[measured]
    end = smoothed(run.losses, np.array([run.config.train.steps]), smoothing_window(run))[0]
    return float(end) if math.isfinite(end) else None


def cells(runs: Iterable[Run], measured: str) -> dict[tuple[str, float], Cell]:
    """(label, learning rate) -> its runs."""
    made: dict[tuple[str, float], Cell] = {}
    for run in runs:
        cell = made.get((run.label, run.rate), Cell({}, {}, ()))
        loss = final_loss(run, measured)
        if loss is not None:
            cell = dataclasses.replace(cell, losses={**cell.losses, run.seed: loss})
        elif run.status == DIVERGED:
            cell = dataclasses.replace(cell, diverged={**cell.diverged, run.seed: run.diverged_at})
        else:
            cell = dataclasses.replace(cell, unfinished=(*cell.unfinished, run.seed))
        made[run.label, run.rate] = cell
    return made


def best_rate(label: str, made: Mapping[tuple[str, float], Cell]) -> float | None:
    """The learning rate with the lowest mean loss, of those with the most finished seeds, then the fewest diverged.

    A rate at which runs diverge is not best for the losses of the runs that happened to survive. None where no run
    of the label finished.
    """
    mine = {rate: cell for (name, rate), cell in made.items() if name == label and cell.losses}
    if not mine:
        return None
    return min(mine, key=lambda rate: (-len(mine[rate].losses), len(mine[rate].diverged), mine[rate].mean))


def paired_difference(ours: Cell, theirs: Cell, confidence: float = 0.95) -> Difference | None:
    """The mean over seeds s of d_s = ours(s) - theirs(s), with its Student-t confidence interval.

    half_width = t * sd(d) / sqrt(n), t the (1 + confidence)/2 quantile of Student's t with n - 1 degrees of freedom and
    sd the sample standard deviation. Pairing takes out what a seed does to both, such as the order of the data.
    The interval supposes that the d_s are independent and about normal.

    Returns:
      None where no seed has a loss on both sides.
    """
    seeds = tuple(sorted(ours.losses.keys() & theirs.losses.keys()))
    if not seeds:
        return None
    every = {seed for cell in (ours, theirs) for seed in (*cell.losses, *cell.diverged, *cell.unfinished)}
    differences = np.array([ours.losses[seed] - theirs.losses[seed] for seed in seeds])
    count, half_width = len(seeds), None
    if count > 1:
        quantile = stats.t.ppf((1 + confidence) / 2, count - 1)
        half_width = float(quantile * differences.std(ddof=1) / math.sqrt(count))
    return Difference(float(differences.mean()), half_width, seeds, len(every) - count)


def smoothing_window(run: Run) -> int:
    """Steps that a smoothed training loss is the mean of: a fiftieth of the run."""
    return max(1, run.config.train.steps // 50)


def smoothed(
    series: Sequence[tuple[int, float]], at: Int[np.ndarray, "points"], window: int
) -> Float[np.ndarray, "points"]:
    """At each step s the mean of the series' finite values of steps s - window + 1 to s; NaN where there are none."""
    finite = [(step, value) for step, value in series if math.isfinite(value)]
    steps = np.array([step for step, _ in finite], dtype=np.int64)
    sums = np.concatenate([[0.0], np.cumsum([value for _, value in finite], dtype=np.float64)])
    first, last = np.searchsorted(steps, at - window, side="right"), np.searchsorted(steps, at, side="right")
    counts = last - first
    return np.where(counts > 0, (sums[last] - sums[first]) / np.maximum(counts, 1), np.nan)


def spike_score(series: Iterable[tuple[int, float]]) -> float | None:
    """SpikeScore of a whole series, in percent; None where it is empty."""
    spikes = SpikeScore()
    for _, value in series:
        spikes.add(value)
    return spikes.score


def percentiles(series: Iterable[tuple[int, float]], which: Sequence[int] = (50, 90, 99)) -> list[float] | None:
    """Of the finite values, by linear interpolation; None where there are none."""
    finite = [value for _, value in series if math.isfinite(value)]
    return [float(value) for value in np.percentile(finite, which)] if finite else None


def median(values: Sequence[float]) -> float | None:
    """None where there are none."""
    return float(np.median(values)) if values else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is reported: the runs of a directory, the label they are compared with, and comparison.json."""

    directory: Path
    runs: list[Run]
    baseline: str
    made_by: dict[str, Any]

    @cached_property
    def ended(self) -> list[Run]:
        """The runs that finished or diverged."""
        return [run for run in self.runs if run.status != UNFINISHED]

    @cached_property
    def measured(self) -> str:
        """The validation set whose loss is compared."""
        return measured_set(self.runs)

    @cached_property
    def cells(self) -> dict[tuple[str, float], Cell]:
        """(label, learning rate) -> its runs."""
        return cells(self.runs, self.measured)

    @cached_property
    def labels(self) -> list[str]:
        """The baseline first, the others in alphabetical order."""
        return [self.baseline, *sorted({run.label for run in self.runs} - {self.baseline})]

    @cached_property
    def rates(self) -> list[float]:
        """All learning rates, in rising order."""
        return sorted({run.rate for run in self.runs})

    @cached_property
    def best(self) -> dict[str, float | None]:
        """Label -> its best learning rate."""
        return {label: best_rate(label, self.cells) for label in self.labels}

    @cached_property
    def numbers(self) -> dict[str, dict[str, float | int | None]]:
        """Name of a run -> run_numbers."""
        return {run.name: run_numbers(run, self.measured) for run in self.runs}

    def of(self, label: str, rate: float | None = None) -> list[Run]:
        """The runs of a label that ended, at one rate or at all."""
        return [run for run in self.ended if run.label == label and rate in (None, run.rate)]


def run_numbers(run: Run, measured: str) -> dict[str, float | int | None]:
    """What the tables say of one run: losses, spike scores (percent), gradient-norm percentiles, speed, cost."""
    norms = percentiles(run.gradient_norms) or [None] * 3
    return {
        "step": run.step,
        "diverged_at": run.diverged_at,
        "final_loss": final_loss(run, measured),
        **{f"loss_{name}": loss for name, loss in sorted(run.scores.items())},
        "loss_spike_score": spike_score(run.losses),
        "gradient_spike_score": spike_score(run.gradient_norms),
        "steps_counted": len(run.losses),
        **dict(zip(("grad_norm_p50", "grad_norm_p90", "grad_norm_p99"), norms, strict=True)),
        "tokens_per_second": median(run.rates),
        "tokens": run.tokens,
        "train_tokens": run.result.get("train_tokens"),
        "seconds": run.result.get("seconds"),
        "resumed_from": run.result.get("resumed_from"),
    }
