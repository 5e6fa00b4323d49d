"""Steps that were skipped: a line for each, and the end of the run where they are too many."""

import math
import sys

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.hooks.progress_bar import say_above_bar
from hybridnorm_jax.training.run import Numbers, Run
from hybridnorm_jax.training.step_directories import CheckpointError

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
        self._spikes = 0

    def start(self, run: Run) -> None:
        """Note how many spikes were skipped before: one more says why the next step is skipped."""
        self._spikes = int(run.state.anomalies.spikes)

    def on_numbers(self, run: Run, numbers: Numbers) -> None:
        """Say why a step was skipped, if it was."""
        if not numbers.skipped:
            return
        is_spike = numbers.metrics["skipped_spikes"] > self._spikes
        self._spikes = int(numbers.metrics["skipped_spikes"])
        reason = f"loss {numbers.metrics['loss']:.4f} is a spike" if is_spike else _not_finite(numbers)
        say_above_bar(f"{run.named}step {numbers.step}: skipped, {reason}", file=sys.stderr)
        if numbers.metrics["skipped_in_a_row"] >= self._most_in_a_row:
            raise _diverged(run, numbers, reason)


def _not_finite(numbers: Numbers) -> str:
    """Which of loss, gradient and update is NaN or infinite."""
    metrics = numbers.metrics
    odd = [f"{name} is {metrics[key]}" for key, name in MUST_BE_FINITE.items() if not math.isfinite(metrics[key])]
    return " and ".join(odd) or "the parameters after its update are not finite"


def _diverged(run: Run, numbers: Numbers, reason: str) -> DivergedError:
    """The error, which names the checkpoint to go back to; a save that is running is waited for.

    A checkpoint from after the last step that was made holds the parameters with which the steps fail.
    """
    in_a_row = int(numbers.metrics["skipped_in_a_row"])
    parts = [f"step {numbers.step}: {reason}", f"{in_a_row} steps in a row were skipped (train.max_bad_steps)"]
    try:
        run.checkpoints.wait()
    except CheckpointError as error:
        parts.append(str(error))
    good = run.checkpoints.newest_good(before=numbers.step - in_a_row)
    if good is None:
        parts.append(f"no checkpoint from before them is in {run.checkpoints.directory}")
    else:
        parts.append(f"the last good checkpoint is that of step {good}, in {run.checkpoints.directory}")
    return DivergedError(numbers.step, "; ".join(parts))
