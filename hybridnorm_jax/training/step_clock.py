"""How long single steps take: those that only trained."""

import array
import time
from collections.abc import Callable

import jax
import numpy as np

# JAX reports one of these for each program that it compiles, also where it finds it in its cache on disk.
COMPILED = "/jax/core/compile/backend_compile_duration"


class StepClock:
    """Seconds of the steps that only trained.

    A step takes from the result of the step before it, or from the end of what was done in between, to its own result.
    That includes the wait for its batch and the writing of metrics. Left out are the first step of a process, steps
    in which something was compiled, steps that were skipped, and steps that share the device or this process with
    other work (`leave_out`): a measurement of the layers, a profile.

    Results are read one step late: meanwhile the next batch was waited for. A result that is read at once, because the
    device is to become idle, has no such wait in its time. It is left out as well, unless it is the first since
    `restart`, whose time holds its own wait.

    Args:
      now: the clock, in seconds.
      compilations: how many programs were compiled so far.

    Attributes:
      line: the seconds of the steps since the last line of metrics.
      process: those of all steps of this process.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, compilations: Callable[[], int] | None = None):
        self._now = now
        self._compilations = _compilations if compilations is None else compilations
        self._began: float | None = None
        self._compiled_before = self._compilations()
        self._left_out: set[int] = set()
        self._is_first = True
        self.line: list[float] = []
        self.process = array.array("d")

    def tick(self, step: int, *, was_skipped: bool = False, at_once: bool = False) -> float | None:
        """The result of a step has been seen.

        Args:
          step: which it is.
          was_skipped: whether it was computed and not made.
          at_once: whether it was read before the next batch was waited for.

        Returns:
          The seconds that it took, whether or not it only trained; None where nothing says when it began.
        """
        now, compiled = self._now(), self._compilations()
        seconds = None if self._began is None else now - self._began
        only_trained = not was_skipped and step not in self._left_out and compiled == self._compiled_before
        is_whole = self._is_first or not at_once
        self._left_out.discard(step)
        self._began, self._compiled_before, self._is_first = now, compiled, False
        if seconds is not None and only_trained and is_whole:
            self.line.append(seconds)
            self.process.append(seconds)
        return seconds

    def leave_out(self, step: int) -> None:
        """The device, or this process, does something else during this step."""
        self._left_out.add(step)

    def restart(self) -> None:
        """Something else was done and is over, the device is idle: the next step begins now."""
        self._began, self._compiled_before, self._is_first = self._now(), self._compilations(), True

    def begin_line(self) -> None:
        """Forget the seconds, not the last result: no time is lost between lines."""
        self.line = []

    def percentiles(self) -> dict[str, float | None]:
        """Median, 90th percentile and largest of the seconds since the last line."""
        percents = {"time/step_p50": 50, "time/step_p90": 90, "time/step_max": 100}
        if not self.line:
            return dict.fromkeys(percents)
        return {name: float(np.percentile(self.line, percent)) for name, percent in percents.items()}


_count = 0


def _compilations() -> int:
    return _count


def _count_compilation(event: str, _: float, **__: object) -> None:
    global _count
    _count += event == COMPILED


jax.monitoring.register_event_duration_secs_listener(_count_compilation)
