"""Figures that set labels side by side: best losses, losses over arithmetic operations, and by size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from hybridnorm_jax.lab.figure_styles import BLACK, Style, figure, legend_above, styles_of
from hybridnorm_jax.lab.report.costs import Curve
from hybridnorm_jax.lab.report.loss_figures import LOSS, NARROW
from hybridnorm_jax.lab.report.scaling import Family
from hybridnorm_jax.lab.report.significance import Inference, infer
from hybridnorm_jax.lab.report.statistics import ComparedRuns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Float[np.ndarray, "seeds"]


def best_losses_figure(compared: ComparedRuns) -> "Figure":
    """A row for each label, at its best rate: at the left its loss, at the right its difference from its baseline.

    A marker is a mean, a bar its 95 % interval, a dot one seed. A label of which no run finished has words instead.
    """
    labels = compared.labels
    made, (panels,) = figure(columns=2, width=6.8, height=1.3 + 0.32 * len(labels))
    losses, differences = panels
    styles = styles_of(labels)
    for row, label in enumerate(labels):
        group = compared.best_group(label)
        if group is None or not group.losses:
            words = "diverged" if group is not None and group.diverged else "not finished"
            losses.annotate(words, (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
            continue
        values = np.array(list(group.losses.values()))
        _draw_mean(losses, row, values, infer(values), styles[label])
        found = compared.best_differences.get(label)
        if found is not None:
            _draw_mean(differences, row, np.array(found.differences), found.inference, styles[label])
    losses.set_yticks(range(len(labels)), labels)
    differences.set_yticks(range(len(labels)), [""] * len(labels))
    for panel in panels:
        panel.set_ylim(len(labels) - 0.5, -0.5)
        panel.locator_params(axis="x", nbins=4)
    losses.set_xlabel(LOSS)
    differences.axvline(0, color=BLACK, linewidth=0.9)
    whose = compared.baseline if compared.has_one_baseline else "its baseline"
    differences.set_xlabel(f"minus {whose}, by seed (nats)")
    return made


def _draw_mean(axis: "Axes", row: int, values: Values, found: Inference | None, style: Style) -> None:
    """One row: the seeds as dots a little below, the mean as a marker, and its interval if there is one."""
    axis.plot(values, np.full(len(values), row + 0.25), ".", color=style.color, markersize=3)
    axis.plot([values.mean()], [row], marker=style.marker, color=style.color, linestyle="")
    if found is not None:
        axis.plot(found.interval, [row, row], color=style.color, linewidth=1.6)


def operations_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Loss over arithmetic operations: at the left whole runs, at the right the second half of the longest one."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    made, axes = figure(columns=2, width=6.8)
    whole, second_half = axes[0]
    middle = max(curve.total for curve in curves.values()) / 2
    for label, style in styles_of(curves).items():
        curve = curves[label]
        spacing = max(1, len(curve.operations) // 9)
        late = curve.operations >= middle
        whole.plot(curve.operations, curve.losses, label=label, markevery=spacing, **style.points)
        second_half.plot(curve.operations[late], curve.losses[late], markevery=max(1, spacing // 2), **style.points)
    for axis, title in ((whole, "whole runs"), (second_half, "second half")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("arithmetic operations")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(4))
    whole.set_ylabel(LOSS)
    legend_above(made)
    return made


def scaling_figure(families: Sequence[Family]) -> "Figure":
    """Loss by parameters: a point for each run, an open marker for each mean, and the fitted lines."""
    from matplotlib.ticker import EngFormatter, NullLocator

    made, axes = figure(width=NARROW)
    axis = axes[0, 0]
    styles = styles_of(family.name for family in families)
    for family in families:
        style = styles[family.name]
        sizes = [size for size in family.sizes if size.losses]
        means = [size.mean for size in sizes]
        counts = [size.parameters for size in sizes]
        # Without a line nothing says what lies between the sizes.
        line = style.linestyle if family.line is not None else ""
        axis.plot([], [], label=family.name, color=style.color, marker=style.marker, linestyle=line)
        axis.plot(counts, means, color=style.color, marker=style.marker, linestyle="")
        for size in sizes:
            axis.plot([size.parameters] * len(size.losses), size.losses, ".", markersize=3, color=style.color)
        if family.line is not None:
            ends = np.array([counts[0], counts[-1]])
            axis.plot(ends, family.line.intercept + family.line.slope * np.log2(ends), **style.line)
    axis.set_xscale("log", base=2)
    axis.set_xticks(_apart(sorted({size.parameters for family in families for size in family.sizes})))
    axis.xaxis.set_major_formatter(EngFormatter(places=1, sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("parameters without embeddings")
    axis.set_ylabel(LOSS)
    legend_above(made)
    return made


def _apart(counts: Sequence[int]) -> list[int]:
    """The rising counts without those that lie so close to the one before that their ticks would overlap."""
    kept: list[int] = []
    for count in counts:
        # Schemes of one width and depth differ a little, by their norms.
        if not kept or count > 1.2 * kept[-1]:
            kept.append(count)
    return kept
