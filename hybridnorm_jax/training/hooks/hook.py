"""What a hook is, and when the training loop calls it."""

from typing import TYPE_CHECKING

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.step import Batch

if TYPE_CHECKING:  # run.py imports this file
    from hybridnorm_jax.training.run import Numbers, Run


class Hook:
    """Something that happens besides the steps of a run; a subclass overrides those methods that it needs.

    In each step the loop calls, for every hook that is due in it, in the order of the list:

      before_step    Nothing of the step was done. Whether the run is told to stop is looked at afterwards.
      before_update  The batch is there. The state is that before the step.
      after_step     The state is that after the step. The device may still be busy with it.

    and, for every hook that is due in the step that the numbers are of:

      on_numbers     The metrics are there. This comes one step late, between before_update and after_step of the next
                     step, so that the device has work while they are read. A hook that is to have all numbers sooner
                     calls run.read_late(), which calls on_numbers: saving and evaluation do so first. Where one does
                     so in its after_step, the hooks behind it get the numbers of that step before their after_step.

    In each run it calls, for all hooks in the order of the list:

      start          Before the first step of this process.
      stopped        The run is told to stop (a signal, a preemption notice). No step is made after it.
      end            All steps were made. Not called where the run is stopped or fails.
      close          However the run ends, also by an error; in reverse order.

    Throughput is measured over the steps that only trained. A hook that does other work in a step, or gives the device
    some, calls run.read_late() and run.clock.leave_out(run.step + 1) before it, and run.read_late() and
    run.clock.restart() once it is done; work between two steps needs run.read_late() before and run.clock.restart()
    after it.

    With several processes, all of them call the same methods in the same order. So whether a hook does something
    collective (a computation on global arrays, a save) must not depend on what differs between them, such as the time.

    Attributes:
      every: steps between two in which the hook is due; None: never.
    """

    every: int | None = 1

    def is_due(self, run: "Run", step: int) -> bool:
        """Whether this hook is called in a step: every `every`-th, counted from the run's beginning, and the last."""
        return self.every is not None and (step % self.every == 0 or step == run.steps)

    def start(self, run: "Run") -> None:
        """Before the first step of this process."""

    def before_step(self, run: "Run") -> None:
        """Before step run.step + 1."""

    def before_update(self, run: "Run", batch: Batch) -> None:
        """Before step run.step + 1, with this process's share of its batch, in NumPy."""

    def after_step(self, run: "Run") -> None:
        """After step run.step."""

    def on_numbers(self, run: "Run", numbers: "Numbers") -> None:
        """With the metrics of step numbers.step."""

    def stopped(self, run: "Run") -> str | None:
        """When the run is told to stop; returns what is to be said of it, None: nothing."""

    def end(self, run: "Run") -> None:
        """After the last step."""

    def close(self) -> None:
        """However the run ends, and whether or not `start` was called."""


def check_hook(hook: Hook) -> None:
    """Raise UserError for what is no hook, before anything is computed.

    Raises:
      UserError: names the class, and what would be right.
    """
    if not isinstance(hook, Hook):
        raise UserError(f"hooks: {hook!r} is no object of a subclass of Hook; make one, such as MyHook()")
    if hook.every is not None and (type(hook.every) is not int or hook.every < 1):
        raise UserError(f"hooks: {type(hook).__name__}.every={hook.every!r}: must be at least 1, or None for never")
