"""The spike score of a series, kept up to date value by value."""

import math

import numpy as np

WINDOW, SIGMAS, FEWEST = 1000, 7.0, 10


class SpikeScore:
    """Percentage of values that lie at least 7 standard deviations from the mean of the (up to 1,000) values before.

    OLMo 2 (2501.00656) scores losses and gradient norms so. A value that is not finite is a spike and stays out of the
    window; the first 10 finite values are none.
    """

    def __init__(self):
        self._window = np.empty(WINDOW)  # a ring, its oldest value overwritten next
        self._finite = self._spikes = self._values = 0

    def add(self, value: float) -> None:
        """One more value."""
        self._values += 1
        if not math.isfinite(value):
            self._spikes += 1
            return
        if self._finite >= FEWEST:
            # Of the window anew: running sums of squares lose the deviation of a loss that hardly moves.
            window = self._window[: self._finite]
            mean, deviation = window.mean(), window.std()
            # Where all are alike rounding may leave a deviation.
            self._spikes += bool(abs(value - mean) >= SIGMAS * deviation and window.min() < window.max())
        self._window[self._finite % WINDOW] = value
        self._finite += 1

    @property
    def score(self) -> float | None:
        """In percent; None before the first value."""
        return 100 * self._spikes / self._values if self._values else None
