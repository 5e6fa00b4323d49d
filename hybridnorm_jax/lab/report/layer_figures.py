"""Figures of what was watched in every layer, at the first and at the last watched step."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from hybridnorm_jax.lab.figure_styles import figure, legend_above, styles_of
from hybridnorm_jax.lab.report.statistics import mean_of_known
from hybridnorm_jax.lab.run_files import WatchedStep
from hybridnorm_jax.lab.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Layers = Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What a figure of layers shows.

    Attributes:
      name: of the figure, and of its file.
      axis: the label of the y axis, with its unit.
      meaning: for the caption.
      read: takes WatchedStep.layers and returns one number per layer, None or NaN where there is none; returns None
        where the quantity was not measured.
      on_stream: measured on the stream, after the embedding and after each block, rather than in each block.
      logarithmic: the y axis is.
    """

    name: str
    axis: str
    meaning: str
    read: Callable[[Mapping[str, Layers]], Layers | None]
    on_stream: bool = False
    logarithmic: bool = False


def _measured(key: str) -> Callable[[Mapping[str, Layers]], Layers | None]:
    """Reads what was measured under this key."""
    return lambda layers: layers.get(key)


def _update_ratio(layers: Mapping[str, Layers]) -> Layers | None:
    updates, parameters = layers.get("update/block"), layers.get("parameter/block")
    if updates is None or parameters is None:
        return None
    return [
        update / parameter if update is not None and parameter else math.nan
        for update, parameter in zip(updates, parameters, strict=True)
    ]


QUANTITIES = (
    Quantity(
        name="stream-rms",
        axis="RMS of the residual stream",
        meaning="Root mean square of the residual stream's elements",
        read=_measured("stream_rms"),
        on_stream=True,
        logarithmic=True,
    ),
    Quantity(
        name="stream-gradient",
        axis="gradient norm at the stream",
        meaning="Norm of the loss's gradient with respect to the residual stream",
        read=_measured("stream_gradient"),
        on_stream=True,
        logarithmic=True,
    ),
    Quantity(
        name="block-gradient",
        axis="gradient norm of a block",
        meaning="Norm of the gradient with respect to all of a block's parameters",
        read=_measured("gradient/block"),
        logarithmic=True,
    ),
    Quantity(
        name="update-ratio",
        axis="update / parameter norm",
        meaning="Norm of a block's update over the norm of its parameters",
        read=_update_ratio,
        logarithmic=True,
    ),
    Quantity(
        name="attention-entropy",
        axis="attention entropy (nats)",
        meaning="Mean entropy of the attention's rows",
        read=_measured("attention_entropy"),
    ),
    Quantity(
        name="largest-logit",
        axis="largest attention logit",
        meaning="Largest attention logit before the softmax",
        read=_measured("largest_logit"),
    ),
    Quantity(
        name="token-similarity",
        axis="cosine similarity",
        meaning="Mean cosine similarity of the stream's tokens to each other",
        read=_measured("token_similarity"),
        on_stream=True,
    ),
)


def layer_figure(quantity: Quantity, runs_by_label: Mapping[str, Sequence[Run]]) -> "Figure | None":
    """One quantity in every layer, a mean over runs for each label; None where no run has it.

    The left panel is at the first watched step, the right one at the last.
    """
    watched = {label: [run.watched for run in runs if run.watched] for label, runs in runs_by_label.items()}
    first = {label: [steps[0] for steps in each] for label, each in watched.items()}
    last = {label: [steps[-1] for steps in each] for label, each in watched.items()}
    if not any(_layer_means(quantity, steps) is not None for steps in [*first.values(), *last.values()]):
        return None
    made, axes = figure(columns=2, width=6.8, height=3.4)
    left, right = axes[0]
    right.sharey(left)
    _draw_panel(left, quantity, first, title="first watched step")
    _draw_panel(right, quantity, last, title="last watched step")
    # A logarithmic axis that spans less than a decade labels its minor ticks too.
    right.tick_params(which="both", labelleft=False)
    left.set_ylabel(quantity.axis)
    legend_above(made)
    return made


def _draw_panel(axis: "Axes", quantity: Quantity, watched: Mapping[str, Sequence[WatchedStep]], *, title: str) -> None:
    """Draw one line per label.

    Args:
      watched: label -> what was watched in each of its runs.
    """
    for label, style in styles_of(watched).items():
        means = _layer_means(quantity, watched[label])
        if means is not None:
            spacing = max(1, len(means) // 12)
            # 0 is after the embedding, 1 after block 1; what is measured in a block has the number of the block.
            first = 0 if quantity.on_stream else 1
            depths = np.arange(first, first + len(means))
            axis.plot(depths, means, label=label, markevery=spacing, **style.points)
    numbers = sorted({step.step for steps in watched.values() for step in steps})
    span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    axis.set_title(f"{title} ({span})", fontsize=10)
    axis.set_xlabel("depth: blocks passed (0: embedding)" if quantity.on_stream else "depth: number of the block")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if quantity.logarithmic:
        axis.set_yscale("log")


def _layer_means(quantity: Quantity, watched: Sequence[WatchedStep]) -> Float[np.ndarray, "layers"] | None:
    """Means over runs; None where none has a finite value, NaN where a mean has no place on the axis."""
    read = [quantity.read(step.layers) for step in watched]
    rows = [np.array(values, dtype=np.float64) for values in read if values is not None]
    if not rows or not np.isfinite(rows).any():
        return None
    means = mean_of_known(np.stack(rows))
    return np.where(means > 0, means, np.nan) if quantity.logarithmic else means
