"""A figure for each measure of `lab signal`: a panel for every depth and initializer, a line for every scheme."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybridnorm_jax.lab.styles import figure, legend_above, save_png, styles_of

if TYPE_CHECKING:
    from hybridnorm_jax.lab.signal import Signal

# Measure -> (its axis, whether that is logarithmic).
AXES = {
    "stream_rms": ("RMS of the stream", True),
    "token_similarity": ("cosine similarity of two tokens", False),
    "stream_gradient": ("|d loss / d stream| (nats)", True),
    "attention_entropy": ("attention entropy (nats)", False),
    "largest_logit": ("largest attention logit", True),
}


def write_figures(out: Path, signals: Sequence["Signal"]) -> list[Path]:
    """<out>/<measure>.png for every measure that has a value for each layer; returns their paths."""
    names = dict.fromkeys(name for signal in signals for name, values in signal.measures.items() if values.ndim)
    paths = []
    for name in names:
        path = out / f"{name.replace('/', '-')}.png"
        save_png(_figure(name, signals), path)
        paths.append(path)
    return paths


def _figure(name: str, signals: Sequence["Signal"]):
    depths = sorted({signal.depth for signal in signals})
    initializers = list(dict.fromkeys(signal.initializer for signal in signals))
    styles = styles_of([signal.scheme for signal in signals])
    of = name.removeprefix("gradient/")
    label, logarithmic = AXES.get(name, (f"|d loss / d weights| of {'a block' if of == 'block' else of}", True))
    made, axes = figure(len(depths), len(initializers), width=3.4 * len(depths), height=2.8 * len(initializers) + 0.6)
    for signal in signals:
        if name not in signal.measures:
            continue
        values = signal.measures[name]
        panel = axes[initializers.index(signal.initializer), depths.index(signal.depth)]
        # After the embedding stands at 0, after block 1 at 1; what is inside a block is at its number.
        blocks = np.arange(len(values)) + (0 if len(values) == signal.depth + 1 else 1)
        spacing = max(1, len(values) // 6)
        panel.plot(blocks, values, label=signal.scheme, markevery=spacing, **styles[signal.scheme].points)
    for row, initializer in enumerate(initializers):
        for column, depth in enumerate(depths):
            panel = axes[row, column]
            panel.set_title(f"{depth} blocks, {initializer} initialization", fontsize=9)
            panel.set_xlabel("block")
            if logarithmic:
                panel.set_yscale("log")
        axes[row, 0].set_ylabel(label)
    legend_above(made, columns=min(6, 2 * len(depths)))
    return made
