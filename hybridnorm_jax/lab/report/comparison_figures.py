"""Figures that set labels side by side: losses by size."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridnorm_jax.lab.figure_styles import figure, legend_above, styles_of
from hybridnorm_jax.lab.report.loss_figures import LOSS
from hybridnorm_jax.lab.report.scaling import Family

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
