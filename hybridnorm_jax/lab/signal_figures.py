"""A figure for each measure of `lab signal`: a panel for every depth and initializer, a line for every scheme."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hybridnorm_jax.lab.figure_styles import figure, legend_above, save_png, styles_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybridnorm_jax.lab.signal_at_start import Signal


class Axis(NamedTuple):
    """The y axis of a measure."""

    label: str
    is_logarithmic: bool


# Of the measures that are no gradients of weights.
AXES = {
    "stream_rms": Axis("RMS of the stream", is_logarithmic=True),
    "token_similarity": Axis("cosine similarity of two tokens", is_logarithmic=False),
    "stream_gradient": Axis("|d loss / d stream| (nats)", is_logarithmic=True),
    "attention_entropy": Axis("attention entropy (nats)", is_logarithmic=False),
    "largest_logit": Axis("largest attention logit", is_logarithmic=True),
}


def write_figures(out: Path, signals: Sequence["Signal"]) -> list[Path]:
    """Write <out>/<measure>.png for every measure that has a value for each layer; returns their paths."""
    names = dict.fromkeys(name for signal in signals for name, values in signal.measures.items() if values.ndim)
    paths = []
    for name in names:
        path = out / f"{name.replace('/', '-')}.png"
        save_png(_figure(name, signals), path)
        paths.append(path)
    return paths


def _figure(name: str, signals: Sequence["Signal"]) -> "Figure":
    depths = sorted({signal.depth for signal in signals})
    initializers = list(dict.fromkeys(signal.initializer for signal in signals))
    styles = styles_of(signal.scheme for signal in signals)
    width, height = 3.4 * len(depths), 2.8 * len(initializers) + 0.6
    made, panels = figure(columns=len(depths), rows=len(initializers), width=width, height=height)
    for signal in signals:
        if name not in signal.measures:
            continue
        values = signal.measures[name]
        panel = panels[initializers.index(signal.initializer), depths.index(signal.depth)]
        # 0 is after the embedding, 1 after block 1; a measure inside a block has the number of the block.
        first = 0 if len(values) == signal.depth + 1 else 1
        blocks = np.arange(first, first + len(values))
        spacing = max(1, len(values) // 6)
        panel.plot(blocks, values, label=signal.scheme, markevery=spacing, **styles[signal.scheme].points)
    axis = _axis(name)
    for initializer, row in zip(initializers, panels, strict=True):
        for depth, panel in zip(depths, row, strict=True):
            panel.set_title(f"{depth} blocks, {initializer} initialization", fontsize=9)
            panel.set_xlabel("block")
            if axis.is_logarithmic:
                panel.set_yscale("log")
        row[0].set_ylabel(axis.label)
    legend_above(made, columns=min(6, 2 * len(depths)))
    return made


def _axis(name: str) -> Axis:
    if name in AXES:
        return AXES[name]
    group = name.removeprefix("gradient/")
    weights = "a block" if group == "block" else group
    return Axis(f"|d loss / d weights| of {weights}", is_logarithmic=True)
