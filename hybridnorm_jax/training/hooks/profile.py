"""A trace of a few steps for JAX's profiler."""

import sys
from collections.abc import Callable

import jax

from hybridnorm_jax.errors import first_line
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.hooks.progress_bar import say_above_bar
from hybridnorm_jax.training.run import Run

# The first step of a process compiles, which would drown the others in a trace.
FIRST_PROFILED, PROFILED_STEPS = 2, 5


class Profile(Hook):
    """Writes a trace of steps 2 to 6 of this process to <run>/profile, or of as many of them as are made."""

    def __init__(self, *, enabled: bool):
        self.every = 1 if enabled else None
        self._tracing = False

    def is_due(self, run: Run, step: int) -> bool:
        """In the steps that are profiled."""
        number = step - run.first
        return self.every is not None and FIRST_PROFILED <= number < FIRST_PROFILED + PROFILED_STEPS

    def before_step(self, run: Run) -> None:
        """Begin the trace before the first of these steps."""
        run.clock.leave_out(run.step + 1)
        if not self._tracing:
            run.read_late()
            self._attempt(lambda: jax.profiler.start_trace(str(run.directory / "profile")))
            self._tracing = self.every is not None

    def after_step(self, run: Run) -> None:
        """End the trace after the last of these steps, or of the run."""
        if run.step == run.steps or not self.is_due(run, run.step + 1):
            run.read_late()
            self._stop(run)
            run.clock.restart()

    def stopped(self, run: Run) -> None:
        """End the trace early."""
        self._stop(run)

    def _stop(self, run: Run) -> None:
        if self._tracing:
            jax.block_until_ready(run.state)
            self._attempt(jax.profiler.stop_trace)
            self._tracing = False

    def _attempt(self, action: Callable[[], None]) -> None:
        """Go on without a profile where it cannot be written: the run does not depend on it."""
        try:
            action()
        except Exception as error:
            self.every = None
            say_above_bar(
                f"train.profile=true: {first_line(error)}; the run goes on without a profile", file=sys.stderr
            )
