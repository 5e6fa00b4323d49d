"""Figures that set labels side by side: losses by size, and over arithmetic operations."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridnorm_jax.lab.figure_styles import figure, legend_above, styles_of
from hybridnorm_jax.lab.report.costs import Curve
from hybridnorm_jax.lab.report.loss_figures import LOSS
from hybridnorm_jax.lab.report.scaling import Family

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    made, axes = figure()
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
    axis.set_xticks(sorted({size.parameters for family in families for size in family.sizes}))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("parameters without embeddings")
    axis.set_ylabel(LOSS)
    legend_above(made)
    return made
