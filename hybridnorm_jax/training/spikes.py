"""The spike score of a series, kept up to date value by value."""

import collections
import math

WINDOW, SIGMAS, FEWEST = 1000, 7.0, 10


class SpikeScore:
    """Percentage of values that lie at least 7 standard deviations from the mean of the (up to 1,000) values before.

    OLMo 2 (2501.00656) scores losses and gradient norms so. A value that is not finite is a spike and stays out of the
    window; the first 10 finite values are none.
    """

    def __init__(self):
        self._window: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._spikes = self._values = 0

    def add(self, value: float) -> None:
        """One more value."""
        self._values += 1
        if not math.isfinite(value):
            self._spikes += 1
            return
        if len(self._window) >= FEWEST:
            # Summed anew: running sums of squares lose the deviation of a loss that hardly moves.
            mean = math.fsum(self._window) / len(self._window)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self._window) / len(self._window))
            self._spikes += abs(value - mean) >= SIGMAS * deviation > 0
        self._window.append(value)

    @property
    def score(self) -> float | None:
        """In percent; None before the first value."""
        return 100 * self._spikes / self._values if self._values else None
