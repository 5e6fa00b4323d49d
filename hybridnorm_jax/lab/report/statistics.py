"""The numbers of a comparison: means over seeds, paired differences, best learning rates, smoothing, spikes."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from hybridnorm_jax.lab.groups import RunGroup, best_rate, final_loss, group_runs, measured_set
from hybridnorm_jax.lab.run_files import UNFINISHED, Point
from hybridnorm_jax.lab.runs import Run
from hybridnorm_jax.training.spikes import SpikeScore
from hybridnorm_jax.training.throughput import tokens_per_second


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two labels' losses, over the seeds that finished for both.

    Attributes:
      mean: of (loss - baseline's loss) over seeds; below 0 the label is better.
      half_width: of the confidence interval mean +- half_width; None with one seed.
      seeds: those that were paired.
      left_out: how many seeds were run for either label and did not finish for both.
    """

    mean: float
    half_width: float | None
    seeds: tuple[int, ...]
    left_out: int


def paired_difference(ours: RunGroup, theirs: RunGroup, confidence: float = 0.95) -> Difference | None:
    """The mean over seeds s of d_s = ours(s) - theirs(s), with its Student-t confidence interval.

    half_width = t * sd(d) / sqrt(n), t the (1 + confidence)/2 quantile of Student's t, n - 1 degrees of freedom,
    sd the sample standard deviation. Pairing removes what a seed does to both runs alike: the numbers that both draw
    for parameters and dropout. It does not remove the order of the data, which all runs of a comparison share. The
    interval supposes that the d_s are independent and about normal.

    Returns:
      None where no seed has a loss on both sides.
    """
    seeds = tuple(sorted(ours.losses.keys() & theirs.losses.keys()))
    if not seeds:
        return None
    differences = np.array([ours.losses[seed] - theirs.losses[seed] for seed in seeds])
    count, half_width = len(seeds), None
    if count > 1:
        quantile = stats.t.ppf((1 + confidence) / 2, count - 1)
        half_width = float(quantile * differences.std(ddof=1) / math.sqrt(count))
    return Difference(
        mean=float(differences.mean()),
        half_width=half_width,
        seeds=seeds,
        left_out=len(ours.seeds | theirs.seeds) - count,
    )


def spike_score(series: Iterable[Point]) -> float | None:
    """SpikeScore of a whole series, in percent; None where it is empty."""
    spikes = SpikeScore()
    for point in series:
        spikes.add(point.value)
    return spikes.score


class Percentiles(NamedTuple):
    """Percentiles of a series; None where it has no finite value."""

    p50: float | None
    p90: float | None
    p99: float | None


def percentiles(series: Iterable[Point]) -> Percentiles:
    """Percentiles of the finite values, by linear interpolation."""
    finite = [point.value for point in series if math.isfinite(point.value)]
    if not finite:
        return Percentiles(p50=None, p90=None, p99=None)
    p50, p90, p99 = (float(value) for value in np.percentile(finite, [50, 90, 99]))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def median(values: Sequence[float]) -> float | None:
    """The median; None where there are no values."""
    return float(np.median(values)) if values else None


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_of_known(rows: Float[np.ndarray, "runs points"]) -> Float[np.ndarray, "points"]:
    """Column means of the finite values; NaN where a column has none."""
    known = np.isfinite(rows)
    counts = known.sum(axis=0)
    return np.where(counts > 0, np.where(known, rows, 0).sum(axis=0) / np.maximum(counts, 1), np.nan)


@dataclasses.dataclass(frozen=True)
class ComparedRuns:
    """What a report is about.

    Attributes:
      directory: of the runs.
      baseline: the label that the others are compared with.
      made_by: the content of comparison.json; empty where there is no such file.
      shows_speed: whether tokens per second are shown.
    """

    directory: Path
    runs: list[Run]
    baseline: str
    made_by: dict[str, Any]
    shows_speed: bool = False

    @cached_property
    def ended(self) -> list[Run]:
        """The runs that finished or diverged."""
        return [run for run in self.runs if run.status != UNFINISHED]

    @cached_property
    def measured(self) -> str:
        """The validation set whose loss is compared, or TRAINING."""
        return measured_set(self.runs)

    @cached_property
    def groups(self) -> dict[tuple[str, float], RunGroup]:
        """(label, learning rate) -> its runs."""
        return group_runs(self.runs, self.measured)

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
        return {label: best_rate(label, self.groups) for label in self.labels}

    @cached_property
    def numbers(self) -> dict[str, dict[str, float | int | None]]:
        """Name of a run -> run_numbers, without its speed where that is not shown."""
        numbers = {run.name: run_numbers(run, self.measured) for run in self.runs}
        if not self.shows_speed:
            for of_run in numbers.values():
                del of_run["tokens_per_second"]
        return numbers

    def tried(self, label: str) -> list[float]:
        """The learning rates of a label, in rising order."""
        return sorted(rate for name, rate in self.groups if name == label)

    def ended_runs(self, label: str, rate: float | None = None) -> list[Run]:
        """The runs of a label that finished or diverged, at one learning rate or, with None, at all of them."""
        return [run for run in self.ended if run.label == label and (rate is None or run.rate == rate)]


def run_numbers(run: Run, measured: str) -> dict[str, float | int | None]:
    """The numbers of one run: losses, spike scores (percent), gradient-norm percentiles, speed and cost.

    The keys are columns of report.csv.
    """
    norms = percentiles(run.gradient_norms)
    losses = {f"loss_{name}": loss for name, loss in sorted(run.scores.items())}
    return {
        "step": run.step,
        "diverged_at": run.diverged_at,
        "final_loss": final_loss(run, measured),
        **losses,
        "loss_spike_score": spike_score(run.losses),
        "gradient_spike_score": spike_score(run.gradient_norms),
        "steps_counted": len(run.losses),
        "grad_norm_p50": norms.p50,
        "grad_norm_p90": norms.p90,
        "grad_norm_p99": norms.p99,
        "tokens_per_second": tokens_per_second(run.step_seconds, run.config.tokens_per_step),
        "tokens": run.tokens,
        "train_tokens": run.result.get("train_tokens"),
        "seconds": run.result.get("seconds"),
        "resumed_from": run.result.get("resumed_from"),
    }
