"""When a run counts as diverged although its numbers stayed finite."""

from collections.abc import Sequence

import numpy as np

# Shares of all steps, and nats per token.
STRETCH, RISE = 0.1, 0.5


def rising_since(losses: Sequence[tuple[int, float]]) -> int | None:
    """The step from which a run only got worse, or None where it did not diverge.

    With means over a tenth of the steps: it diverged if the last mean, and the median of its steps, lie more than 0.5
    nats above the lowest; the step is the last one of the lowest mean. Steps without a finite loss are left out.

    Args:
      losses: (step, training loss in nats per token), in order.
    """
    finite = [(step, loss) for step, loss in losses if np.isfinite(loss)]
    width = max(1, round(STRETCH * len(finite)))
    if len(finite) < 2 * width:
        return None
    values = np.array([loss for _, loss in finite])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[width:] - sums[:-width]) / width
    lowest = int(means.argmin())
    last = min(means[-1], np.median(values[-width:]))  # of a single spike near the end the median knows nothing
    return finite[lowest + width - 1][0] if last > means[lowest] + RISE else None
