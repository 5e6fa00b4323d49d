"""When a run counts as diverged although its numbers stayed finite."""

from collections.abc import Sequence

import numpy as np

from hybridnorm_jax.lab.run_files import Point

# The share of all steps over which a mean is taken, and a difference of losses in nats per token.
STRETCH, RISE = 0.1, 0.5


def rising_since(losses: Sequence[Point]) -> int | None:
    """The step after which a run only got worse; None where it did not diverge.

    Means are taken over a tenth of the steps. The run diverged if the last mean, and also the median of the last tenth
    of the steps, lie more than 0.5 nats above the lowest mean. The step returned is the last one of the lowest mean.
    Steps without a finite loss are left out.

    Args:
      losses: training losses in nats per token, in the order of their steps.
    """
    finite = [point for point in losses if np.isfinite(point.value)]
    width = max(1, round(STRETCH * len(finite)))
    if len(finite) < 2 * width:
        return None
    values = np.array([point.value for point in finite])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (sums[width:] - sums[:-width]) / width
    lowest = int(means.argmin())
    # A single spike near the end raises the mean and not the median.
    end = min(means[-1], np.median(values[-width:]))
    return finite[lowest + width - 1].step if end > means[lowest] + RISE else None
