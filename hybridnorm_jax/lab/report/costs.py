"""What labels cost in arithmetic operations, and how they compare where all have spent the same number of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hybridnorm_jax.lab.groups import TRAINING, final_loss, smoothed, smoothing_window
from hybridnorm_jax.lab.report.blocks import Cell, Table
from hybridnorm_jax.lab.report.columns import LABEL, numbers, shown
from hybridnorm_jax.lab.report.formats import loss_text, operations_text, ratio_text, share_text, signed_text
from hybridnorm_jax.lab.report.statistics import ComparedRuns, mean_of_known
from hybridnorm_jax.lab.run_files import FINISHED
from hybridnorm_jax.lab.runs import Run

# Points of a training loss, which has a value at every step.
POINTS = 200


@dataclasses.dataclass(frozen=True)
class Curve:
    """The loss of a label over arithmetic operations, a mean over its seeds.

    Attributes:
      operations: of all steps up to each point, in rising order.
      losses: in nats per token; NaN where no run has a finite one.
      total: the operations of a whole run.
    """

    operations: Float[np.ndarray, "points"]
    losses: Float[np.ndarray, "points"]
    total: float

    def at(self, operations: float) -> float | None:
        """The loss there, by linear interpolation between the points; None before the first or after the last."""
        known = np.isfinite(self.losses)
        x, y = self.operations[known], self.losses[known]
        # A product of steps and operations may differ from another one of the same size by a rounding error.
        if not x.size or not x[0] * (1 - 1e-9) <= operations <= x[-1] * (1 + 1e-9):
            return None
        return float(np.interp(operations, x, y))


def loss_over_operations(compared: ComparedRuns) -> dict[str, Curve]:
    """Label -> its curve, at its best learning rate; only labels that finished and whose cost is known."""
    curves = {}
    for label in compared.labels:
        finished = [run for run in compared.final_runs(label) if run.status == FINISHED]
        counted = [run for run in finished if run.operations]
        if counted:
            curves[label] = _curve(counted, compared.measured)
    return curves


def _curve(runs: Sequence[Run], measured: str) -> Curve:
    """The mean over runs of one configuration, at the steps at which all of them were measured."""
    by_step = [_losses_by_step(run, measured) for run in runs]
    steps = sorted(set.intersection(*(set(losses) for losses in by_step)))
    rows = np.array([[losses[step] for step in steps] for losses in by_step], dtype=np.float64)
    total = runs[0].operations
    each = total / runs[0].config.train.steps
    return Curve(operations=each * np.array(steps, dtype=np.float64), losses=mean_of_known(rows), total=total)


def _losses_by_step(run: Run, measured: str) -> dict[int, float]:
    """Step -> loss on the set that is compared: its evaluations, or the smoothed training loss."""
    last = run.config.train.steps
    if measured == TRAINING:
        steps = np.unique(np.linspace(1, last, POINTS).astype(np.int64))
        values = smoothed(run.losses, steps, window=smoothing_window(run))
        return {int(step): float(value) for step, value in zip(steps, values, strict=True)}
    at_end = final_loss(run, measured)
    assert at_end is not None, "only finished runs are drawn"
    return {**{point.step: point.value for point in run.validation.get(measured, ())}, last: at_end}


def operations_per_token(compared: ComparedRuns) -> dict[str, float]:
    """Label -> arithmetic operations of a training step, divided by its tokens; only labels of which it is known."""
    return {
        run.label: float(run.result["flops_per_step"]) / run.config.tokens_per_step
        for run in compared.runs
        if run.result.get("flops_per_step")
    }


def equal_operations_table(compared: ComparedRuns) -> Table | None:
    """Cost, and the loss where each label has spent what the cheapest one spends in all; None without two costs."""
    curves = loss_over_operations(compared)
    if len(curves) < 2:
        return None
    budget = min(curve.total for curve in curves.values())
    per_token = operations_per_token(compared)
    baseline = curves.get(compared.baseline)
    baseline_cost = per_token.get(compared.baseline)
    baseline_loss = None if baseline is None else baseline.at(budget)
    rows = []
    for label, curve in curves.items():
        loss = curve.at(budget)
        # Without a baseline, and of the baseline itself, there is no difference.
        has_difference = loss is not None and baseline_loss is not None and label != compared.baseline
        rows.append(
            [
                label,
                shown(per_token[label], operations_text),
                shown(per_token[label] / baseline_cost if baseline_cost else None, ratio_text),
                shown(curve.total, operations_text),
                shown(budget / curve.total, share_text),
                Cell("before the first evaluation") if loss is None else shown(loss, loss_text),
                shown(loss - baseline_loss if has_difference else None, signed_text),
                shown(compared.best_group(label).mean, loss_text),
            ]
        )
    return Table(
        "equal-operations",
        f"Loss at {operations_text(budget)} operations, what a whole run of the cheapest label takes; each label at "
        "its own best learning rate",
        [
            LABEL,
            *numbers("operations per token", f"ratio to {compared.baseline}", "operations of a run"),
            *numbers("share of its steps", "loss there", f"minus {compared.baseline}'s", "loss at the end"),
        ],
        rows,
    )
