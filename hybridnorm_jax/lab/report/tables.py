"""The tables of a report."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.lab.groups import RunGroup
from hybridnorm_jax.lab.labels import differing, settings
from hybridnorm_jax.lab.report.blocks import Cell, Column, Table
from hybridnorm_jax.lab.report.columns import LABEL, RATE, numbers, shown
from hybridnorm_jax.lab.report.costs import operations_per_token
from hybridnorm_jax.lab.report.facts import facts
from hybridnorm_jax.lab.report.formats import (
    NONE,
    digits_text,
    duration_text,
    loss_text,
    percent_text,
    range_text,
    rate_text,
    ratio_text,
)
from hybridnorm_jax.lab.report.significance import infer
from hybridnorm_jax.lab.report.statistics import ComparedRuns, mean, percentiles
from hybridnorm_jax.lab.run_files import FINISHED
from hybridnorm_jax.lab.runs import Run
from hybridnorm_jax.training.throughput import tokens_per_second

# ---- What was compared


def facts_table(compared: ComparedRuns) -> Table:
    """What all runs share."""
    return Table(
        "facts", "All runs", [Column("property"), Column("value")], [[fact.name, fact.text] for fact in facts(compared)]
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
    return Table("labels", caption, [LABEL, *map(Column, names)], rows)


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _differences(before: RunConfig, after: RunConfig) -> str:
    old, new = settings(before), settings(after)
    return "; ".join(f"{key}: {spelled(old[key])} → {spelled(new[key])}" for key in differing([before, after]))


# ---- Final losses


def best_losses_table(compared: ComparedRuns) -> Table:
    """Each label at its own best learning rate: mean, interval of the mean, and cost."""
    per_token = operations_per_token(compared)
    baseline_cost = per_token.get(compared.baseline)
    shows_cost = baseline_cost is not None and len(per_token) > 1
    rows = []
    for label in compared.labels:
        group = compared.best_group(label)
        losses = [] if group is None else list(group.losses.values())
        found = infer(np.array(losses))
        cost = per_token[label] / baseline_cost if baseline_cost and label in per_token else None
        rows.append(
            [
                label,
                shown(compared.best[label], rate_text),
                _finished_text(compared, label),
                shown(group.mean if group else None, loss_text),
                Cell(NONE) if found is None else Cell(range_text(found.interval), value=tuple(found.interval)),
                *([shown(cost, ratio_text)] if shows_cost else []),
            ]
        )
    relative = f". Cost is arithmetic operations per token, relative to {compared.baseline}" if shows_cost else ""
    costs = numbers("relative cost") if shows_cost else []
    return Table(
        "best-losses",
        f"Loss at each label's best learning rate ({compared.measured}, nats per token; smaller is better), with the "
        f"95 % interval of its mean over seeds{relative}",
        [LABEL, *numbers("best rate", "finished", "mean loss", "95 % interval"), *costs],
        rows,
    )


def _finished_text(compared: ComparedRuns, label: str) -> str:
    """How many runs finished at the best rate or, where there is none, of all runs of the label."""
    group = compared.best_group(label)
    if group is None:
        return f"0 of {sum(run.label == label for run in compared.runs)}"
    return f"{len(group.losses)} of {len(group.seeds)}"


def final_losses_table(compared: ComparedRuns) -> Table:
    """The final loss of every seed that is compared, and the mean over seeds."""
    seeds = sorted({run.seed for run in compared.ended} - compared.sweep_seeds)
    rows = []
    for label in compared.labels:
        for rate in compared.compared_at(label):
            group = compared.groups[label, rate]
            if group.losses or group.diverged:
                row = [label, shown(rate, rate_text), shown(group.mean, loss_text), shown(group.deviation, loss_text)]
                row += [_seed_cell(group, seed) for seed in seeds]
                counts = len(group.losses), len(group.diverged), len(group.unfinished)
                rows.append([*row, *(shown(count, str) for count in counts)])
    return Table(
        "final-losses",
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


def _seed_cell(group: RunGroup, seed: int) -> Cell:
    if seed in group.losses:
        return shown(group.losses[seed], loss_text)
    return Cell("diverged" if seed in group.diverged else NONE)


def other_sets_table(compared: ComparedRuns) -> Table | None:
    """Losses of the validation sets that are not compared; None where there are none."""
    sets = sorted({name for run in compared.ended for name in run.scores} - {compared.measured})
    if not sets:
        return None
    rows = []
    for label in compared.labels:
        rate = compared.best[label]
        if rate is not None:
            finished = [run for run in compared.final_runs(label) if run.status == FINISHED]
            means = [mean(run.scores.get(name) for run in finished) for name in sets]
            rows.append([label, shown(rate, rate_text), *(shown(value, loss_text) for value in means)])
    caption = "Other sets: mean loss at the best learning rate"
    return Table("other-sets", caption, [LABEL, RATE, *numbers(*sets)], rows)


# ---- Stability


def stability_table(compared: ComparedRuns) -> Table:
    """The mean loss of each label at each learning rate, shaded, with what diverged.

    With a sweep these are the runs of its seeds: all rates were then tried with the same ones.
    """
    groups_by_key = compared.choosing_groups
    # Shades are ranks: one label that hardly learned would otherwise make all others look alike.
    ranked = sorted({group.mean for group in groups_by_key.values() if group.mean is not None})
    rates = sorted({rate for _, rate in groups_by_key})
    rows = []
    for label in compared.labels:
        groups = [groups_by_key.get((label, rate)) for rate in rates]
        rows.append([label, *(_stability_cell(group, ranked) for group in groups)])
    columns = [LABEL, *(Column(f"learning rate {rate_text(rate)}") for rate in rates)]
    of_sweep = ", of the sweep's runs" if compared.sweep_seeds else ""
    caption = (
        f"Mean final loss by label and learning rate{of_sweep}. The stronger the shade, the larger; a frame marks "
        "where a run diverged"
    )
    return Table("stability", caption, columns, rows)


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
    return Cell("; ".join(parts), shade=shade, failed=bool(group.diverged), value=group.mean)


# ---- Spikes, speed, runs


def spikes_table(compared: ComparedRuns) -> Table:
    """Spike scores, and percentiles of the gradient norm."""
    rows = []
    for label in compared.labels:
        for rate in compared.rates:
            runs = compared.ended_runs(label, rate)
            if any(run.losses for run in runs):
                rows.append([label, shown(rate, rate_text), *_spike_cells(compared, runs)])
    return Table(
        "spikes",
        "Spike scores of loss and gradient norm (mean over runs); percentiles of the norm (all runs together)",
        [LABEL, RATE, *numbers("steps", "loss spikes", "norm spikes", "norm 50 %", "90 %", "99 %")],
        rows,
    )


def _spike_cells(compared: ComparedRuns, runs: Sequence[Run]) -> list[Cell]:
    steps = sum(len(run.losses) for run in runs)
    of_loss = mean(compared.numbers[run.name]["loss_spike_score"] for run in runs)
    of_norm = mean(compared.numbers[run.name]["gradient_spike_score"] for run in runs)
    norms = percentiles(point for run in runs for point in run.gradient_norms)
    return [
        Cell(f"{steps:,}", value=steps),
        shown(of_loss, percent_text),
        shown(of_norm, percent_text),
        *(shown(norm, digits_text) for norm in norms),
    ]


def speed_table(compared: ComparedRuns) -> Table:
    """Tokens per second of each label, over the steps of all its runs that finished."""
    speeds = {}
    for label in compared.labels:
        runs = [run for run in compared.ended_runs(label) if run.status == FINISHED]
        seconds = [each for run in runs for each in run.step_seconds]
        speeds[label] = tokens_per_second(seconds, runs[0].config.tokens_per_step) if runs else None
    baseline = speeds[compared.baseline]
    rows = [
        [label, shown(speed, digits_text), shown(speed / baseline if baseline else None, ratio_text)]
        for label, speed in speeds.items()
        if speed is not None
    ]
    columns = [LABEL, *numbers("median", f"ratio to {compared.baseline}")]
    return Table("speed", "Tokens per second of training", columns, rows)


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
    rows = [_run_cells(run, compared.numbers[run.name]) for run in compared.runs]
    return Table("runs", "Every run. report.csv has all of its numbers", columns, rows)


def _run_cells(run: Run, of_run: dict[str, Any]) -> list[str | Cell]:
    resumed = of_run["resumed_from"]
    return [
        run.name,
        run.label,
        shown(run.rate, rate_text),
        shown(run.seed, str),
        run.status if run.diverged_at is None else f"diverged at step {run.diverged_at}",
        Cell(NONE if run.step is None else f"{run.step:,}", value=run.step),
        shown(of_run["final_loss"], loss_text),
        shown(of_run["seconds"], duration_text),
        Cell(f"step {resumed}" if resumed else NONE, value=resumed or None),
    ]
