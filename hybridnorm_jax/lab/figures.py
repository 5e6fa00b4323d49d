"""The figures of a report: losses over tokens, losses by learning rate, and what was watched in every layer."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hybridnorm_jax.lab import styles
from hybridnorm_jax.lab.runs import DIVERGED, FINISHED, Run
from hybridnorm_jax.lab.statistics import Cell, smoothed, smoothing_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a curve: more are not told apart, and would make the page large.
POINTS = 200
LOSS = "loss (nats per token)"


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What a figure of layers shows.

    Attributes:
      name: of the figure, and of its file.
      axis: the label of the y axis, with its unit.
      meaning: for the caption.
      values: from the watch/... values of one step, one number per layer, None or NaN where there is none.
      stream: measured on the stream, after the embedding and after each block, rather than in each block.
      log: the y axis is logarithmic.
    """

    name: str
    axis: str
    meaning: str
    values: Callable[[Mapping[str, list]], Sequence[float | None] | None]
    stream: bool = False
    log: bool = False


def _ratio(values: Mapping[str, list]) -> list[float] | None:
    above, below = values.get("update/block"), values.get("parameter/block")
    if above is None or below is None:
        return None
    return [u / p if u is not None and p else math.nan for u, p in zip(above, below, strict=True)]


QUANTITIES = (
    Quantity(
        *("stream-rms", "RMS of the residual stream", "Root mean square of the residual stream's elements"),
        *(lambda values: values.get("stream_rms"), True, True),
    ),
    Quantity(
        *("stream-gradient", "gradient norm at the stream", "Norm of the loss's gradient by the residual stream"),
        *(lambda values: values.get("stream_gradient"), True, True),
    ),
    Quantity(
        *("block-gradient", "gradient norm of a block", "Norm of the gradient by all of a block's parameters"),
        *(lambda values: values.get("gradient/block"), False, True),
    ),
    Quantity(
        *("update-ratio", "update / parameter norm", "Norm of a block's update over the norm of its parameters"),
        *(_ratio, False, True),
    ),
    Quantity(
        *("attention-entropy", "attention entropy (nats)", "Mean entropy of the attention's rows"),
        lambda values: values.get("attention_entropy"),
    ),
    Quantity(
        *("largest-logit", "largest attention logit", "Largest attention logit before the softmax"),
        lambda values: values.get("largest_logit"),
    ),
    Quantity(
        *("token-similarity", "cosine similarity", "Mean cosine similarity of the stream's tokens to each other"),
        *(lambda values: values.get("token_similarity"), True),
    ),
)


def loss_curves(runs: Sequence[Run], rates: Sequence[float], measured: str) -> "Figure":
    """Loss over tokens, a column per learning rate: above the whole run, below its second half, scaled to it."""
    chosen = styles.styles_of(run.label for run in runs)
    made, axes = styles.figure(len(rates), 2, width=max(6.4, 3.4 * len(rates)), height=6.4)
    for column, rate in enumerate(rates):
        here = [run for run in runs if run.rate == rate]
        for label in sorted({run.label for run in here}):
            mine = [run for run in here if run.label == label]
            for whole, axis in ((True, axes[0, column]), (False, axes[1, column])):
                _draw_label(axis, label, mine, chosen[label], measured, whole)
        axes[0, column].set_title(f"learning rate {number(rate)}", fontsize=10)
        axes[1, column].set_title("second half", fontsize=10)
        _count_tokens(axes[0, column])
        _count_tokens(axes[1, column])
        _limit(axes[0, column], here)
    for row in axes:
        row[0].set_ylabel(LOSS)
    styles.legend_above(made)
    return made


def _draw_label(axis: "Axes", label: str, runs: Sequence[Run], style: styles.Style, measured: str, whole: bool) -> None:
    """One label's mean over the runs that finished, and each run that diverged, in the whole run or its second half."""
    config = runs[0].config
    steps, per_step = config.train.steps, config.tokens_per_step
    at = np.unique(np.linspace(1 if whole else steps // 2 + 1, steps, POINTS).astype(np.int64))
    finished = [run for run in runs if run.status == FINISHED]
    if whole:
        axis.plot([], [], label=label, **style.points)
    if finished:
        curves = np.stack([smoothed(run.losses, at, smoothing_window(run)) for run in finished])
        every = {"markevery": max(1, len(at) // 9), "markersize": 3.5}
        axis.plot(at * per_step, mean_of_known(curves), **style.points, **every)
        points = [[p for p in run.validation.get(measured, ()) if whole or p[0] > steps // 2] for run in finished]
        shared = sorted(set.intersection(*({step for step, _ in mine} for mine in points)))
        means = [np.mean([dict(mine)[step] for mine in points]) for step in shared]
        look = {"marker": style.marker, "color": style.color, "markerfacecolor": "white", "markersize": 7}
        axis.plot(np.array(shared) * per_step, means, linestyle="", zorder=3, **look)
    for run in (run for run in runs if run.status == DIVERGED and run.losses):
        reached = at[at <= run.losses[-1][0]]
        curve = smoothed(run.losses, reached, smoothing_window(run))
        axis.plot(reached * per_step, curve, alpha=0.6, linewidth=0.9, **style.line)


def _limit(axis: "Axes", runs: Sequence[Run]) -> None:
    """A loss that diverged may be any size: the axis ends a little above the largest loss that a run began with."""
    top = max((run.losses[0][1] for run in runs if math.isfinite(run.losses[0][1])), default=math.inf)
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()])
    shown = drawn[np.isfinite(drawn) & (drawn <= top)]
    if drawn[np.isfinite(drawn)].max(initial=0) > 1.05 * top and shown.size:
        margin = 0.05 * (top - shown.min())
        axis.set_ylim(shown.min() - margin, top + margin)


def _count_tokens(axis: "Axes") -> None:
    """Ticks such as 5M instead of a power of ten at the end of the axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(5))


def rate_curves(cells: Mapping[tuple[str, float], Cell]) -> "Figure":
    """Final loss by learning rate: a line through the means of each label, a point for each run that finished."""
    labels = sorted({label for label, _ in cells})
    made, axes = styles.figure()
    for label, style in styles.styles_of(labels).items():
        mine = sorted((rate, cell) for (name, rate), cell in cells.items() if name == label and cell.losses)
        axes[0, 0].plot([rate for rate, _ in mine], [cell.mean for _, cell in mine], label=label, **style.points)
        single = [(rate, loss) for rate, cell in mine for loss in cell.losses.values() if len(cell.losses) > 1]
        axes[0, 0].plot(*zip(*single, strict=True) if single else ([], []), ".", markersize=3, color=style.color)
    axes[0, 0].set_xscale("log")
    rates = sorted({rate for _, rate in cells})
    axes[0, 0].set_xticks(rates, [number(rate) for rate in rates], minor=False)
    axes[0, 0].set_xticks([], minor=True)
    axes[0, 0].set_xlabel("peak learning rate")
    axes[0, 0].set_ylabel(LOSS)
    styles.legend_above(made)
    return made


def layers(quantity: Quantity, chosen: Mapping[str, Sequence[Run]]) -> "Figure | None":
    """One quantity in every layer, at the first and the last watched step; None where no run has it.

    Args:
      chosen: label -> its runs, over which the mean is taken.
    """
    ends = {(label, end): _layer_means(quantity, runs, end) for label, runs in chosen.items() for end in (0, -1)}
    if not any(means is not None for means in ends.values()):
        return None
    made, axes = styles.figure(2, width=6.8, height=3.4)
    axes[0, 1].sharey(axes[0, 0])
    for label, style in styles.styles_of(chosen).items():
        for axis, end in ((axes[0, 0], 0), (axes[0, 1], -1)):
            means = ends[label, end]
            if means is not None:
                axis.plot(range(len(means)), means, label=label, markevery=max(1, len(means) // 12), **style.points)
    for axis, end, word in ((axes[0, 0], 0, "first"), (axes[0, 1], -1, "last")):
        steps = sorted({run.watched[end][0] for runs in chosen.values() for run in runs if run.watched})
        axis.set_title(f"{word} watched step ({_span(steps)})", fontsize=10)
        axis.set_xlabel("blocks passed (0: embedding)" if quantity.stream else "layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if quantity.log:
            axis.set_yscale("log")
    # A logarithmic axis that spans less than a decade labels its minor ticks too.
    axes[0, 1].tick_params(which="both", labelleft=False)
    axes[0, 0].set_ylabel(quantity.axis)
    styles.legend_above(made)
    return made


def _layer_means(quantity: Quantity, runs: Sequence[Run], end: int) -> Float[np.ndarray, "layers"] | None:
    rows = [quantity.values(run.watched[end][1]) for run in runs if run.watched]
    rows = [np.array(row, dtype=np.float64) for row in rows if row is not None]
    if not rows or not np.isfinite(rows).any():
        return None
    means = mean_of_known(np.stack(rows))
    return np.where(means > 0, means, np.nan) if quantity.log else means


def mean_of_known(rows: Float[np.ndarray, "runs points"]) -> Float[np.ndarray, "points"]:
    """Column means of the finite values; NaN where a column has none."""
    known = np.isfinite(rows)
    counts = known.sum(axis=0)
    return np.where(counts > 0, np.where(known, rows, 0).sum(axis=0) / np.maximum(counts, 1), np.nan)


def number(value: float) -> str:
    """A learning rate as it was written: 0.0003, not 3e-04; 3e-05 below 0.0001."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _span(steps: Sequence[int]) -> Any:
    return steps[0] if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
