"""Figures of losses: over tokens, and by learning rate."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.lab.figure_styles import Style, figure, legend_above, styles_of
from hybridnorm_jax.lab.groups import RunGroup, smoothed, smoothing_window
from hybridnorm_jax.lab.report.formats import rate_text
from hybridnorm_jax.lab.report.statistics import mean_of_known
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED
from hybridnorm_jax.lab.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a curve: more of them cannot be told apart, and would make the page large.
POINTS = 200
LOSS = "loss (nats per token)"
# Inches of a figure with one panel, which a phone then shows whole.
NARROW = 4.8


def loss_curves(runs: Sequence[Run], rates: Sequence[float], measured: str) -> "Figure":
    """Loss over tokens, a column for each learning rate: above the whole run, below its second half, scaled to it.

    Args:
      runs: of any labels; finished ones and diverged ones are shown.
      rates: the learning rates to show.
      measured: the validation set whose loss is marked.
    """
    styles = styles_of(run.label for run in runs)
    made, axes = figure(columns=len(rates), rows=2, width=max(6.4, 3.4 * len(rates)), height=6.4)
    for rate, (whole, second_half) in zip(rates, axes.T, strict=True):
        at_rate = [run for run in runs if run.rate == rate]
        for label in sorted({run.label for run in at_rate}):
            mine = [run for run in at_rate if run.label == label]
            _draw_label(whole, second_half, mine, styles[label], measured)
        whole.set_title(f"learning rate {rate_text(rate)}", fontsize=10)
        second_half.set_title("second half", fontsize=10)
        _show_tokens(whole)
        _show_tokens(second_half)
        _limit_to_first_losses(whole, at_rate)
    for row in axes:
        row[0].set_ylabel(LOSS)
    legend_above(made)
    return made


def best_rate_curves(runs: Sequence[Run], measured: str) -> "Figure":
    """Loss over tokens, each label at one learning rate: at the left the whole run, at the right its second half.

    Args:
      runs: of each label those at the rate to show.
      measured: the validation set whose loss is marked.
    """
    styles = styles_of(run.label for run in runs)
    made, axes = figure(columns=2, width=6.8)
    whole, second_half = axes[0]
    for label in sorted({run.label for run in runs}):
        _draw_label(whole, second_half, [run for run in runs if run.label == label], styles[label], measured)
    whole.set_title("whole run", fontsize=10)
    second_half.set_title("second half", fontsize=10)
    for axis in (whole, second_half):
        _show_tokens(axis)
    _limit_to_first_losses(whole, runs)
    whole.set_ylabel(LOSS)
    legend_above(made)
    return made


def _draw_label(whole: "Axes", second_half: "Axes", runs: Sequence[Run], style: Style, measured: str) -> None:
    middle = runs[0].config.train.steps // 2
    whole.plot([], [], label=runs[0].label, **style.points)
    _draw_runs(whole, runs, style, measured, first_step=1)
    _draw_runs(second_half, runs, style, measured, first_step=middle + 1)


def _draw_runs(axis: "Axes", runs: Sequence[Run], style: Style, measured: str, *, first_step: int) -> None:
    """One label from `first_step` on: the mean of the runs that finished, and each run that diverged."""
    steps = np.unique(np.linspace(first_step, runs[0].config.train.steps, POINTS).astype(np.int64))
    finished = [run for run in runs if run.status == FINISHED]
    if finished:
        _draw_mean(axis, finished, style, steps)
        _draw_validation(axis, finished, style, measured, first_step=first_step)
    for run in runs:
        if run.status == DIVERGED and run.losses:
            _draw_diverged(axis, run, style, steps)


def _draw_mean(axis: "Axes", runs: Sequence[Run], style: Style, steps: Int[np.ndarray, "points"]) -> None:
    curves = np.stack([smoothed(run.losses, steps, window=smoothing_window(run)) for run in runs])
    tokens = steps * runs[0].config.tokens_per_step
    spacing = max(1, len(steps) // 9)
    axis.plot(tokens, mean_of_known(curves), markevery=spacing, markersize=3.5, **style.points)


def _draw_validation(axis: "Axes", runs: Sequence[Run], style: Style, measured: str, *, first_step: int) -> None:
    """The mean validation loss, at the steps at which every run was evaluated."""
    losses_by_step: dict[int, list[float]] = {}
    for run in runs:
        for step, loss in dict(run.validation.get(measured, ())).items():
            losses_by_step.setdefault(step, []).append(loss)
    shared = sorted(step for step, losses in losses_by_step.items() if step >= first_step and len(losses) == len(runs))
    axis.plot(
        np.array(shared) * runs[0].config.tokens_per_step,
        [np.mean(losses_by_step[step]) for step in shared],
        linestyle="",
        marker=style.marker,
        color=style.color,
        markerfacecolor="white",
        markersize=7,
        zorder=3,
    )


def _draw_diverged(axis: "Axes", run: Run, style: Style, steps: Int[np.ndarray, "points"]) -> None:
    reached = steps[steps <= run.losses[-1].step]
    curve = smoothed(run.losses, reached, window=smoothing_window(run))
    axis.plot(reached * run.config.tokens_per_step, curve, alpha=0.6, linewidth=0.9, **style.line)


def _limit_to_first_losses(axis: "Axes", runs: Sequence[Run]) -> None:
    """End the axis a little above the largest loss that a run began with: a loss that diverged may be any size."""
    first_losses = [run.losses[0].value for run in runs]
    top = max((loss for loss in first_losses if math.isfinite(loss)), default=math.inf)
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()])
    finite = drawn[np.isfinite(drawn)]
    shown = finite[finite <= top]
    if finite.max(initial=0) > 1.05 * top and shown.size:
        margin = 0.05 * (top - shown.min())
        axis.set_ylim(shown.min() - margin, top + margin)


def _show_tokens(axis: "Axes") -> None:
    """Ticks such as 5M, instead of a power of ten at the end of the axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(5))


def rate_curves(groups: Mapping[tuple[str, float], RunGroup]) -> "Figure":
    """Final loss by learning rate: for each label a line through its means, and a point for each run that finished.

    Args:
      groups: (label, learning rate) -> its runs.
    """
    made, axes = figure(width=NARROW)
    axis = axes[0, 0]
    rates = sorted({rate for _, rate in groups})
    for label, style in styles_of(label for label, _ in groups).items():
        mine = {rate: groups[label, rate] for rate in rates if (label, rate) in groups and groups[label, rate].losses}
        axis.plot(list(mine), [group.mean for group in mine.values()], label=label, **style.points)
        point_rates, point_losses = [], []
        for rate, group in mine.items():
            if len(group.losses) > 1:
                point_rates += [rate for _ in group.losses]
                point_losses += group.losses.values()
        axis.plot(point_rates, point_losses, ".", markersize=3, color=style.color)
    axis.set_xscale("log")
    # More names than that do not fit beside each other.
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(rates) > 5 else {}
    axis.set_xticks(rates, [rate_text(rate) for rate in rates], minor=False, **slanted)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("peak learning rate")
    axis.set_ylabel(LOSS)
    legend_above(made)
    return made
