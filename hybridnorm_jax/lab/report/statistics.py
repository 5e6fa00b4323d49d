"""The numbers of a comparison: paired differences, best learning rates, spikes, percentiles."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hybridnorm_jax.lab.groups import RunGroup, best_rate, final_loss, group_runs, measured_set
from hybridnorm_jax.lab.labels import AXES, STEPS, settings
from hybridnorm_jax.lab.pairing import obstacle, read_record
from hybridnorm_jax.lab.report.significance import Inference, infer
from hybridnorm_jax.lab.run_files import UNFINISHED, Point
from hybridnorm_jax.lab.runs import Run
from hybridnorm_jax.training.spikes import SpikeScore
from hybridnorm_jax.training.throughput import tokens_per_second


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two labels' losses, over the seeds that finished for both.

    Attributes:
      differences: loss - baseline's loss, for each of the seeds.
      mean: of the differences; below 0 the label is better.
      deviation: sample standard deviation (n - 1) of the differences; None with one seed.
      inference: interval and p-value of the mean; None with one seed.
      seeds: those that were paired.
      left_out: how many seeds were run for either label and were not paired.
    """

    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    inference: Inference | None
    seeds: tuple[int, ...]
    left_out: int


def paired_difference(ours: RunGroup, theirs: RunGroup, unpaired: Collection[int] = ()) -> Difference | None:
    """The mean over seeds s of d_s = ours(s) - theirs(s), with what significance.infer says of it.

    Pairing removes what a seed does to both runs alike: the numbers that both draw for parameters and dropout, and the
    order of the data where the seed decides it.

    Args:
      unpaired: seeds to leave out, because what they decide was not alike on both sides.

    Returns:
      None where no seed has a loss on both sides.
    """
    seeds = tuple(sorted((ours.losses.keys() & theirs.losses.keys()) - set(unpaired)))
    if not seeds:
        return None
    differences = np.array([ours.losses[seed] - theirs.losses[seed] for seed in seeds])
    return Difference(
        differences=tuple(float(each) for each in differences),
        mean=float(differences.mean()),
        deviation=float(differences.std(ddof=1)) if len(seeds) > 1 else None,
        inference=infer(differences),
        seeds=seeds,
        left_out=len(ours.seeds | theirs.seeds) - len(seeds),
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
    def sweep_seeds(self) -> frozenset[int]:
        """The seeds that only chose the learning rates; empty where there was no sweep."""
        return frozenset(self.made_by.get("sweep_seeds", ())) if self.made_by.get("sweep") else frozenset()

    @cached_property
    def groups(self) -> dict[tuple[str, float], RunGroup]:
        """(label, learning rate) -> its runs, without those that only chose the rate: what is compared."""
        return group_runs((run for run in self.runs if run.seed not in self.sweep_seeds), self.measured)

    @cached_property
    def choosing_groups(self) -> dict[tuple[str, float], RunGroup]:
        """(label, learning rate) -> the runs that the best rates are chosen by: the sweep's, or all without a sweep."""
        if not self.sweep_seeds:
            return self.groups
        return group_runs((run for run in self.runs if run.seed in self.sweep_seeds), self.measured)

    @cached_property
    def labels(self) -> list[str]:
        """The baseline first, the others in the order of natural_order."""
        return [self.baseline, *sorted({run.label for run in self.runs} - {self.baseline}, key=natural_order)]

    @cached_property
    def rates(self) -> list[float]:
        """All learning rates, in rising order."""
        return sorted({run.rate for run in self.runs})

    @cached_property
    def best(self) -> dict[str, float | None]:
        """Label -> its best learning rate."""
        return {label: best_rate(label, self.choosing_groups) for label in self.labels}

    def best_group(self, label: str) -> RunGroup | None:
        """The runs that are compared, of a label at its best learning rate; None where there are none."""
        rate = self.best[label]
        return None if rate is None else self.groups.get((label, rate))

    @cached_property
    def best_differences(self) -> dict[str, Difference | None]:
        """Label -> its difference from its baseline, each at its own best rate; only where both have a best rate."""
        rates = {label: (self.best[label], self.best[other]) for label, other in self.baselines.items()}
        return {label: self.difference(label, *pair) for label, pair in rates.items() if None not in pair}

    @cached_property
    def baselines(self) -> dict[str, str]:
        """Label -> the label that it is compared with, for every label that is compared.

        That is the label of the baseline's scheme which differs from it in the scheme only, such as "pre, d_model=64"
        for "span, d_model=64"; where there is none, the baseline. The labels of the baseline's scheme that others are
        compared with are not compared themselves.
        """
        runs = {run.label: run for run in self.runs}
        scheme = runs[self.baseline].scheme
        others = {_without_scheme(run): label for label, run in runs.items() if run.scheme == scheme}
        partners = {
            label: others[_without_scheme(runs[label])]
            for label in self.labels
            if runs[label].scheme != scheme and _without_scheme(runs[label]) in others
        }
        alone = [label for label in self.labels[1:] if label not in partners and label not in partners.values()]
        compared = partners | dict.fromkeys(alone, self.baseline)
        return {label: compared[label] for label in self.labels if label in compared}

    @property
    def has_one_baseline(self) -> bool:
        """Whether all labels are compared with the baseline itself."""
        return set(self.baselines.values()) <= {self.baseline}

    def difference(self, label: str, rate: float, baseline_rate: float) -> Difference | None:
        """The paired difference of a label from its baseline, each at a learning rate.

        Seeds are left out whose runs read the data in different orders, or recorded that they began with other numbers
        or read other tokens (lab/pairing.py). None where no seed can be paired.
        """
        key, other_key = (label, rate), (self.baselines[label], baseline_rate)
        ours, theirs = self.groups.get(key), self.groups.get(other_key)
        if ours is None or theirs is None:
            return None
        runs, other_runs = self._runs_by_seed[key], self._runs_by_seed[other_key]
        shared = ours.losses.keys() & theirs.losses.keys()
        unpaired = [seed for seed in shared if not _are_paired(runs[seed], other_runs[seed])]
        return paired_difference(ours, theirs, unpaired)

    @cached_property
    def _runs_by_seed(self) -> dict[tuple[str, float], dict[int, Run]]:
        """(label, learning rate) -> seed -> its run."""
        found: dict[tuple[str, float], dict[int, Run]] = {}
        for run in self.runs:
            found.setdefault((run.label, run.rate), {})[run.seed] = run
        return found

    @cached_property
    def numbers(self) -> dict[str, dict[str, float | int | None]]:
        """Name of a run -> run_numbers, without its speed where that is not shown."""
        numbers = {run.name: run_numbers(run, self.measured) for run in self.runs}
        if not self.shows_speed:
            for of_run in numbers.values():
                del of_run["tokens_per_second"]
        return numbers

    def tried(self, label: str) -> list[float]:
        """The learning rates of a label that its best one is chosen from, in rising order."""
        return sorted(rate for name, rate in self.choosing_groups if name == label)

    def compared_at(self, label: str) -> list[float]:
        """The learning rates at which a label has runs that are compared, in rising order."""
        return sorted(rate for name, rate in self.groups if name == label)

    def final_runs(self, label: str) -> list[Run]:
        """The runs of a label at its best learning rate that finished or diverged, without those that chose it."""
        rate = self.best[label]
        if rate is None:
            return []
        return [run for run in self.ended_runs(label, rate) if run.seed not in self.sweep_seeds]

    def ended_runs(self, label: str, rate: float | None = None) -> list[Run]:
        """The runs of a label that finished or diverged, at one learning rate or, with None, at all of them."""
        return [run for run in self.ended if run.label == label and (rate is None or run.rate == rate)]


def natural_order(label: str) -> list[str | float]:
    """What sorts labels by the alphabet and, where they differ in a number, by it: d_model=64 before d_model=128."""
    # Every second part is a number, so that numbers and texts are never compared with each other.
    return [float(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", label))]


def _are_paired(one: Run, other: Run) -> bool:
    """Whether two runs of one seed read the data in one order and, as far as both recorded it, began alike."""
    if _data_order(one) != _data_order(other):
        return False
    records = read_record(one.directory), read_record(other.directory)
    precision = max(float(jnp.finfo(run.config.model.param_dtype).eps) for run in (one, other))
    return None in records or obstacle(*records, precision=precision) is None


def _data_order(run: Run) -> int:
    """The seed that the order of the data is drawn with."""
    data_seed = run.config.train.data_seed
    return run.seed if data_seed is None else data_seed


def _without_scheme(run: Run) -> tuple[tuple[str, str], ...]:
    """What decides a run's trajectory besides scheme, seed and learning rate, and the steps that follow from a budget.

    The standard deviation of initial numbers is left out: where it is not stated it follows from the scheme.
    """
    left_out = {*AXES, STEPS, "model.scheme", "model.init_std"}
    return tuple((key, repr(value)) for key, value in settings(run.config).items() if key not in left_out)


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
