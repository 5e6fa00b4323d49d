"""The tables of a report."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from hybridnorm_jax.config.key_values import show
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.lab.groups import RunGroup
from hybridnorm_jax.lab.labels import differing, settings
from hybridnorm_jax.lab.report.blocks import Cell, Column, Table
from hybridnorm_jax.lab.report.facts import facts
from hybridnorm_jax.lab.report.formats import (
    NONE,
    digits_text,
    duration_text,
    loss_text,
    percent_text,
    rate_text,
    signed_text,
)
from hybridnorm_jax.lab.report.statistics import (
    ComparedRuns,
    mean,
    paired_difference,
    percentiles,
)
from hybridnorm_jax.lab.run_files import FINISHED
from hybridnorm_jax.lab.runs import Run
from hybridnorm_jax.training.throughput import tokens_per_second

LABEL = Column("label")
RATE = Column("learning rate", holds_numbers=True)


def numbers(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name, holds_numbers=True) for name in names]


# ---- Differences from the baseline


class DifferenceTexts(NamedTuple):
    """A difference of losses as a row shows it."""

    seeds: str
    difference: str
    interval: str
    reading: str


DIFFERENCE_COLUMNS = (*numbers("seeds", "difference", "95 % interval"), Column("reading"))


def difference_texts(ours: RunGroup, theirs: RunGroup) -> DifferenceTexts:
    """The mean difference over the seeds that finished on both sides, and what may be read from it."""
    found = paired_difference(ours, theirs)
    if found is None:
        return DifferenceTexts("0", NONE, NONE, "no seed finished on both sides")
    count = len(found.seeds)
    seeds = f"{count} of {count + found.left_out}" if found.left_out else f"{count}"
    difference = signed_text(found.mean)
    if found.half_width is None:
        return DifferenceTexts(seeds, difference, NONE, "one seed: no interval, so it may be chance")
    low, high = found.mean - found.half_width, found.mean + found.half_width
    if high < 0:
        reading = "better"
    elif low > 0:
        reading = "worse"
    else:
        reading = "not told apart: the interval contains 0"
    return DifferenceTexts(seeds, difference, f"{signed_text(low)} to {signed_text(high)}", reading)


def best_rates_table(compared: ComparedRuns) -> Table | None:
    """Differences, each label at its own best learning rate; None where there is nothing to compare."""
    baseline_rate = compared.best[compared.baseline]
    if baseline_rate is None:
        return None
    baseline = compared.groups[compared.baseline, baseline_rate]
    rows = []
    for label in compared.labels[1:]:
        rate = compared.best[label]
        if rate is not None:
            group = compared.groups[label, rate]
            texts = difference_texts(group, baseline)
            rows.append([label, rate_text(rate), rate_text(baseline_rate), loss_text(group.mean), *texts])
    if not rows:
        return None
    return Table(
        f"Loss minus {compared.baseline}'s, each at its own best learning rate; below 0 is better",
        [LABEL, *numbers("its rate", "baseline's rate", "mean loss"), *DIFFERENCE_COLUMNS],
        rows,
    )


def differences_table(compared: ComparedRuns) -> Table | None:
    """Differences at the same learning rate; None where no label shares one with the baseline."""
    rows = []
    for label in compared.labels[1:]:
        for rate in compared.tried(label):
            baseline = compared.groups.get((compared.baseline, rate))
            if baseline is not None:
                rows.append([label, rate_text(rate), *difference_texts(compared.groups[label, rate], baseline)])
    if not rows:
        return None
    caption = f"Loss minus {compared.baseline}'s at the same learning rate and seed; below 0 is better"
    return Table(caption, [LABEL, RATE, *DIFFERENCE_COLUMNS], rows)


# ---- What was compared


def facts_table(compared: ComparedRuns) -> Table:
    """What all runs share."""
    return Table(
        "All runs", [Column("property"), Column("value")], [[fact.name, fact.text] for fact in facts(compared)]
    )


def labels_table(compared: ComparedRuns) -> Table:
    """What each label stands for."""
    configs: dict[str, RunConfig] = {}
    for run in compared.runs:
        configs.setdefault(run.label, run.config)
    baseline = configs[compared.baseline]
    rows = []
    for label in compared.labels:
        model = configs[label].model
        differs = NONE if label == compared.baseline else _differences(baseline, configs[label])
        embedding_norm, final_norm = _yes_or_no(model.has_embedding_norm), _yes_or_no(model.has_final_norm)
        rows.append([label, model.initializer_name, embedding_norm, final_norm, differs])
    names = ("initializer", "embedding norm", "final norm", f"differs from {compared.baseline} in")
    caption = "Labels: what each scheme brings with it, and what differs besides seed and learning rate"
    return Table(caption, [LABEL, *map(Column, names)], rows)


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _differences(before: RunConfig, after: RunConfig) -> str:
    old, new = settings(before), settings(after)
    return "; ".join(f"{key}: {show(old[key])} → {show(new[key])}" for key in differing([before, after]))


# ---- Final losses


def final_losses_table(compared: ComparedRuns) -> Table:
    """The final loss of every seed, and the mean over seeds."""
    seeds = sorted({run.seed for run in compared.ended})
    rows = []
    for label in compared.labels:
        for rate in compared.tried(label):
            group = compared.groups[label, rate]
            if group.losses or group.diverged:
                row = [label, rate_text(rate), loss_text(group.mean), loss_text(group.deviation)]
                row += [_seed_text(group, seed) for seed in seeds]
                row += [str(len(group.losses)), str(len(group.diverged)), str(len(group.unfinished))]
                rows.append(row)
    return Table(
        f"Loss ({compared.measured}, nats per token; smaller is better). Mean and standard deviation (n - 1) are over "
        "the seeds that finished",
        [
            LABEL,
            RATE,
            *numbers("mean", "std. dev."),
            *numbers(*(f"seed {seed}" for seed in seeds)),
            *numbers("finished", "diverged", "unfinished"),
        ],
        rows,
    )


def _seed_text(group: RunGroup, seed: int) -> str:
    if seed in group.losses:
        return loss_text(group.losses[seed])
    return "diverged" if seed in group.diverged else NONE


def other_sets_table(compared: ComparedRuns) -> Table | None:
    """Losses of the validation sets that are not compared; None where there are none."""
    sets = sorted({name for run in compared.ended for name in run.scores} - {compared.measured})
    if not sets:
        return None
    rows = []
    for label in compared.labels:
        rate = compared.best[label]
        if rate is not None:
            finished = [run for run in compared.ended_runs(label, rate) if run.status == FINISHED]
            means = [mean(run.scores.get(name) for run in finished) for name in sets]
            rows.append([label, rate_text(rate), *map(loss_text, means)])
    return Table("Other sets: mean loss at the best learning rate", [LABEL, RATE, *numbers(*sets)], rows)


# ---- Stability


def stability_table(compared: ComparedRuns) -> Table:
    """The mean loss of each label at each learning rate, shaded, with what diverged."""
    # Shades are ranks: one label that hardly learned would otherwise make all others look alike.
    ranked = sorted({group.mean for group in compared.groups.values() if group.mean is not None})
    rows = []
    for label in compared.labels:
        groups = [compared.groups.get((label, rate)) for rate in compared.rates]
        rows.append([label, *(_stability_cell(group, ranked) for group in groups)])
    columns = [LABEL, *(Column(f"learning rate {rate_text(rate)}") for rate in compared.rates)]
    caption = "Mean final loss by label and learning rate. Darker is larger; a frame marks where a run diverged"
    return Table(caption, columns, rows)


def _stability_cell(group: RunGroup | None, ranked: Sequence[float]) -> Cell:
    if group is None:
        return Cell("not run")
    parts = []
    shade = None
    if group.losses:
        ended = len(group.losses) + len(group.diverged)
        share = f" ({len(group.losses)} of {ended})" if group.diverged else ""
        parts.append(f"{loss_text(group.mean)}{share}")
        shade = ranked.index(group.mean) / max(1, len(ranked) - 1)
    if group.diverged:
        steps = sorted(step for step in group.diverged.values() if step is not None)
        parts.append(f"diverged at step {', '.join(map(str, steps))}" if steps else "diverged")
    if group.unfinished:
        parts.append(f"unfinished: {len(group.unfinished)}" if parts else "unfinished")
    return Cell("; ".join(parts), shade=shade, failed=bool(group.diverged))


# ---- Spikes, speed, runs


def spikes_table(compared: ComparedRuns) -> Table:
    """Spike scores, and percentiles of the gradient norm."""
    rows = []
    for label in compared.labels:
        for rate in compared.tried(label):
            runs = compared.ended_runs(label, rate)
            if any(run.losses for run in runs):
                rows.append([label, rate_text(rate), *_spike_texts(compared, runs)])
    return Table(
        "Spike scores of loss and gradient norm (mean over runs); percentiles of the norm (all runs together)",
        [LABEL, RATE, *numbers("steps", "loss spikes", "norm spikes", "norm 50 %", "90 %", "99 %")],
        rows,
    )


def _spike_texts(compared: ComparedRuns, runs: Sequence[Run]) -> list[str]:
    steps = sum(len(run.losses) for run in runs)
    of_loss = mean(compared.numbers[run.name]["loss_spike_score"] for run in runs)
    of_norm = mean(compared.numbers[run.name]["gradient_spike_score"] for run in runs)
    norms = percentiles(point for run in runs for point in run.gradient_norms)
    return [f"{steps:,}", percent_text(of_loss), percent_text(of_norm), *map(digits_text, norms)]


def speed_table(compared: ComparedRuns) -> Table:
    """Tokens per second of each label, over the steps of all its runs that finished."""
    speeds = {}
    for label in compared.labels:
        runs = [run for run in compared.ended_runs(label) if run.status == FINISHED]
        seconds = [each for run in runs for each in run.step_seconds]
        speeds[label] = tokens_per_second(seconds, runs[0].config.tokens_per_step) if runs else None
    baseline = speeds[compared.baseline]
    rows = [
        [label, digits_text(speed), f"{speed / baseline:.3f}" if baseline else NONE]
        for label, speed in speeds.items()
        if speed is not None
    ]
    columns = [LABEL, *numbers("median", f"ratio to {compared.baseline}")]
    return Table("Tokens per second of training", columns, rows)


def runs_table(compared: ComparedRuns) -> Table:
    """Every run."""
    columns = [
        Column("run"),
        LABEL,
        RATE,
        *numbers("seed"),
        Column("status"),
        *numbers("steps", "loss", "wall time"),
        Column("resumed from"),
    ]
    rows = [_run_texts(run, compared.numbers[run.name]) for run in compared.runs]
    return Table("Every run. report.csv has all of its numbers", columns, rows)


def _run_texts(run: Run, of_run: dict[str, Any]) -> list[str]:
    resumed = of_run["resumed_from"]
    return [
        run.name,
        run.label,
        rate_text(run.rate),
        str(run.seed),
        run.status if run.diverged_at is None else f"diverged at step {run.diverged_at}",
        NONE if run.step is None else f"{run.step:,}",
        loss_text(of_run["final_loss"]),
        duration_text(of_run["seconds"]),
        f"step {resumed}" if resumed else NONE,
    ]
