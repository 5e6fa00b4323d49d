"""Scaling: how the loss of one scheme falls with the size of its model."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from hybridnorm_jax.lab.labels import AXES, STEPS, settings
from hybridnorm_jax.lab.report.blocks import Cell, Column, Table
from hybridnorm_jax.lab.report.columns import LABEL, numbers, shown
from hybridnorm_jax.lab.report.formats import loss_text, signed_text
from hybridnorm_jax.lab.report.statistics import ComparedRuns
from hybridnorm_jax.lab.runs import Run
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig

# The keys of a model that only change its size.
SIZES = ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "shared_mlp_dim", "dense_mlp_dim")
SIZE_KEYS = frozenset(f"model.{name}" for name in SIZES)
# Fewer sizes than these fix a line and leave nothing that could contradict it.
FEWEST_SIZES = 3
# The trees of parameters whose size follows from the vocabulary and the number of positions.
EMBEDDINGS = frozenset({"token_embedding", "position_embedding", "head"})


@dataclasses.dataclass(frozen=True)
class Line:
    """A least-squares line loss = intercept + slope * log2(parameters).

    Attributes:
      slope: nats for each doubling of the parameters.
      slope_error: its standard error; None with two points, which leave no residual.
    """

    intercept: float
    slope: float
    slope_error: float | None


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of a scheme.

    Attributes:
      parameters: without embeddings.
      losses: of all seeds that finished at the label's best rate.
    """

    label: str
    parameters: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Mean of the losses; None where there are none."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else None


@dataclasses.dataclass(frozen=True)
class Family:
    """The sizes of one scheme that differ in nothing else.

    Attributes:
      name: the scheme, and what else differs between families.
      sizes: by parameters.
      line: None with fewer than FEWEST_SIZES sizes.
    """

    name: str
    sizes: tuple[Size, ...]
    line: Line | None


def parameters_without_embeddings(model: ModelConfig) -> int:
    """All parameters but the embeddings of tokens and positions and the output head: of blocks and final norm.

    With tied embeddings there is no head of its own. Experts count whole, not only those that a token passes.
    """
    kept = {name: tree for name, tree in abstract_params(model).items() if name not in EMBEDDINGS}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(kept))


def fit(x: Float[np.ndarray, "points"], y: Float[np.ndarray, "points"]) -> Line:
    """The ordinary least-squares line through points, with at least two different x.

    slope = S_xy / S_xx and its standard error sqrt(RSS / (n - 2) / S_xx), with S_xy = sum (x - mean x)(y - mean y) and
    RSS the sum of squared residuals. It supposes independent residuals of one variance about a straight line.
    """
    centered = x - x.mean()
    spread = float((centered**2).sum())
    slope = float((centered * (y - y.mean())).sum()) / spread
    intercept = float(y.mean() - slope * x.mean())
    freedom = len(x) - 2
    residual = float(((y - intercept - slope * x) ** 2).sum())
    error = math.sqrt(residual / freedom / spread) if freedom > 0 else None
    return Line(intercept=intercept, slope=slope, slope_error=error)


def families(compared: ComparedRuns) -> list[Family]:
    """The schemes that were trained at more than one size, in the order of their first label."""
    members: dict[tuple, list[str]] = {}
    runs = {run.label: run for run in compared.runs}
    for label in compared.labels:
        if compared.best_group(label) is not None:
            members.setdefault(_without_size(runs[label]), []).append(label)
    found = []
    for labels in members.values():
        sizes = [
            Size(
                label=label,
                parameters=parameters_without_embeddings(runs[label].config.model),
                losses=tuple(compared.best_group(label).losses.values()),
            )
            for label in labels
        ]
        if len(sizes) > 1:
            found.append(_family(_shared_part(labels), sizes))
    return found


def _without_size(run: Run) -> tuple:
    """Everything that makes a label, without size."""
    left_out = {*SIZE_KEYS, *AXES, STEPS}
    return tuple((key, repr(value)) for key, value in settings(run.config).items() if key not in left_out)


def _family(name: str, sizes: Sequence[Size]) -> Family:
    counted = [size for size in sizes if size.losses]
    # Means, not runs: what keeps the points off a line is its shape, and more seeds do not make more sizes.
    x = np.array([math.log2(size.parameters) for size in counted])
    y = np.array([size.mean for size in counted], np.float64)
    line = fit(x, y) if len(set(x)) >= FEWEST_SIZES else None
    return Family(name=name, sizes=tuple(sorted(sizes, key=_parameters)), line=line)


def _parameters(size: Size) -> int:
    return size.parameters


def _shared_part(labels: Sequence[str]) -> str:
    """The parts that all labels have, such as "pre, warmup_steps=0" of several widths."""
    first, *others = [label.split(", ") for label in labels]
    return ", ".join(part for part in first if all(part in other for other in others))


def sizes_table(found: Sequence[Family]) -> Table:
    """Every size of every family, with its mean loss."""
    rows = [
        [
            family.name,
            size.label,
            Cell(f"{size.parameters:,}", value=size.parameters),
            shown(len(size.losses), str),
            shown(size.mean, loss_text),
        ]
        for family in found
        for size in family.sizes
    ]
    columns = [Column("scheme"), LABEL, *numbers("parameters without embeddings", "seeds", "mean loss")]
    return Table("sizes", "Loss by size, each size at its own best learning rate", columns, rows)


def slopes_table(found: Sequence[Family]) -> Table | None:
    """The fitted lines; None where there is none."""
    rows = []
    for family in found:
        if family.line is not None:
            sizes = len({size.parameters for size in family.sizes if size.losses})
            runs = sum(len(size.losses) for size in family.sizes)
            slope, error = family.line.slope, family.line.slope_error
            rows.append(
                [
                    family.name,
                    shown(sizes, str),
                    shown(runs, str),
                    shown(slope, signed_text),
                    shown(error, loss_text),
                    shown(family.line.intercept, loss_text),
                ]
            )
    if not rows:
        return None
    return Table(
        "slopes",
        "Fitted lines: loss = a + b log2(parameters without embeddings), by least squares of the mean "
        "losses; the standard error has (sizes - 2) degrees of freedom",
        [Column("scheme"), *numbers("sizes", "runs", "b (nats per doubling)", "standard error of b", "a")],
        rows,
    )
