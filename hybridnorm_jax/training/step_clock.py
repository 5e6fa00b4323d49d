"""How long single steps take."""

import time
from collections.abc import Callable

import numpy as np


class StepClock:
    """Seconds from one step's result to the next one's, between two lines of metrics."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._last: float | None = None
        self.seconds: list[float] = []

    def tick(self) -> float | None:
        """A step's result has been seen: the seconds since the one before, None for the first and after a pause."""
        now = self._now()
        seconds = None if self._last is None else now - self._last
        self._last = now
        if seconds is not None:
            self.seconds.append(seconds)
        return seconds

    def pause(self) -> None:
        """Something else was done: the time up to the next result is no step's."""
        self._last = None

    def begin_line(self) -> None:
        """Forget the seconds, not the last result: no time is lost between lines."""
        self.seconds = []

    def rate(self) -> float | None:
        """Steps per second; None before two results were seen."""
        return len(self.seconds) / sum(self.seconds) if self.seconds else None

    def percentiles(self) -> dict[str, float | None]:
        """Median, 90th percentile and largest of the seconds."""
        percents = {"time/step_p50": 50, "time/step_p90": 90, "time/step_max": 100}
        if not self.seconds:
            return dict.fromkeys(percents)
        return {name: float(np.percentile(self.seconds, percent)) for name, percent in percents.items()}
