"""Steps that were skipped: a line for each, and the end of the run where they are too many."""

import math
import sys

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.hooks.progress_bar import say_above_bar
from hybridnorm_jax.training.run import Numbers, Run

# The metrics that must be finite, as they are named in a line.
MUST_BE_FINITE = {"loss": "loss", "grad_norm": "gradient norm"}


class DivergedError(UserError):
    """train.max_bad_steps steps in a row were skipped; `step` is the last of them."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class SkippedSteps(Hook):
    """Says of each step that was skipped why it was (anomalies.judge), on process 0.

    Raises:
      DivergedError: `most_in_a_row` steps in a row were skipped; in every process.
    """

    def __init__(self, *, most_in_a_row: int):
        self._most_in_a_row = most_in_a_row

    def on_numbers(self, run: Run, numbers: Numbers) -> None:
        """Say why a step was skipped, if it was."""
        if not numbers.skipped:
            return
        reason = _reason(numbers)
        say_above_bar(f"step {numbers.step}: skipped, {reason}", file=sys.stderr)
        if numbers.metrics["skipped_in_a_row"] >= self._most_in_a_row:
            raise _diverged(run, numbers, reason)


def _reason(numbers: Numbers) -> str:
    metrics = numbers.metrics
    odd = [f"{name} is {metrics[key]}" for key, name in MUST_BE_FINITE.items() if not math.isfinite(metrics[key])]
    return " and ".join(odd) or f"loss {metrics['loss']:.4f} is a spike"


def _diverged(run: Run, numbers: Numbers, reason: str) -> DivergedError:
    """The error, which names the newest checkpoint; a save that is running is waited for."""
    run.checkpoints.wait()
    newest = run.checkpoints.latest()
    good = "no checkpoint was saved" if newest is None else f"the last good checkpoint is that of step {newest}"
    limit = f"{numbers.metrics['skipped_in_a_row']} steps in a row were skipped (train.max_bad_steps)"
    where = f"in {run.checkpoints.directory}"
    return DivergedError(numbers.step, f"step {numbers.step}: {reason}; {limit}; {good}, {where}")
