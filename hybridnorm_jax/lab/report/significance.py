"""Which differences other seeds would show again: intervals, p-values, corrections and power.

The functions are pure. They take differences paired by seed, d_s = ours(s) - theirs(s), and suppose that these are
independent.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

# Up to so many seeds the interval is Student's, which supposes normal differences. A bootstrap of fewer values is too
# narrow, because they hardly show their own distribution.
MOST_FOR_STUDENT = 10
RESAMPLES = 9999
# What a difference must reach, and with which probability a true one must be found.
LEVEL, POWER = 0.05, 0.8
# No comparison needs more seeds than that; the search for their number ends there.
MOST_SEEDS = 100_000

Differences = Float[np.ndarray, "seeds"]


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


class Inference(NamedTuple):
    """What differences say about their true mean.

    Attributes:
      interval: its confidence interval.
      p: how probable a mean at least so far from 0 is, on either side, where the true mean is 0.
    """

    interval: Interval
    p: float


def infer(differences: Differences, confidence: float = 0.95) -> Inference | None:
    """Student's interval and test up to MOST_FOR_STUDENT seeds, the bootstrap's above; None below two seeds.

    In both, the interval leaves 0 out exactly if p < 1 - confidence.
    """
    count = len(differences)
    if count < 2:
        return None
    if np.ptp(differences) == 0:
        # Without any spread both methods divide by 0.
        value = float(differences[0])
        return Inference(Interval(value, value), p=float(value == 0))
    return student(differences, confidence) if count <= MOST_FOR_STUDENT else bootstrap(differences, confidence)


def student(differences: Differences, confidence: float = 0.95) -> Inference:
    """The paired t-test: interval mean +- t sd / sqrt(n), and p = P(|T| >= |mean| sqrt(n) / sd).

    t is the (1 + confidence) / 2 quantile of Student's T with n - 1 degrees of freedom, sd the sample standard
    deviation (n - 1). It supposes that the differences are about normal.
    Source: Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    count = len(differences)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    half_width = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Inference(Interval(mean - half_width, mean + half_width), p)


def bootstrap(differences: Differences, confidence: float = 0.95) -> Inference:
    """The bootstrap-t of the mean m: as `student`, with the distribution of t taken from RESAMPLES resamples.

    Resample b, with mean m_b and standard error e_b = sd_b / sqrt(n), has t_b = (m_b - m) / e_b. With e the error
    of the differences and q the quantiles of the t_b at (1 - confidence) / 2 and (1 + confidence) / 2, the interval is
    m - q_high e to m - q_low e, and p twice the share of the t_b at or beyond m / e, on the side where that is smaller.

    Resamples without any spread have no t_b and are left out. The resamples are drawn with a fixed seed, so the same
    differences give the same interval. No p is below 2 / (RESAMPLES + 1).

    Percentiles of the m_b themselves, also corrected ones (BCa), are too narrow for so few values: of 11 normal
    differences with a true mean of 0 they told 10 % apart at a level of 5 %, this one 4.5 %, and of skewed ones 12.7 %
    and 5.5 % (1,000 draws each).
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, sections 12.5 and 15.4.
    """
    count, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    generator = np.random.default_rng(0)
    resamples = differences[generator.integers(count, size=(RESAMPLES, count))]
    resamples = resamples[np.ptp(resamples, axis=1) > 0]
    t = (resamples.mean(axis=1) - mean) / (resamples.std(axis=1, ddof=1) / math.sqrt(count))
    low, high = (float(each) for each in np.quantile(t, [(1 - confidence) / 2, (1 + confidence) / 2]))
    # The differences themselves count as one more resample, so that no share is 0.
    shares = [(int(side.sum()) + 1) / (len(t) + 1) for side in (t <= mean / error, t >= mean / error)]
    return Inference(Interval(mean - high * error, mean - low * error), p=min(1.0, 2 * min(shares)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given.

    Of m p-values in rising order, p_(1) to p_(m), the corrected p_(i) is the largest (m - j + 1) p_(j) over j <= i, and
    at most 1. Whatever the comparisons have to do with each other, the probability that any true difference of 0 has a
    corrected p below alpha is at most alpha.
    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    count = len(p_values)
    corrected = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def power(difference: float, deviation: float, count: int) -> float:
    """The probability that a two-sided paired t-test at LEVEL finds a true difference with so many seeds.

    P(|T'| > t), with T' the noncentral t of n - 1 degrees of freedom and noncentrality difference sqrt(n) / deviation,
    t the 1 - LEVEL / 2 quantile of Student's T.
    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, chapter 2.

    Args:
      difference: the true one, in nats.
      deviation: the standard deviation of the paired differences, above 0.
      count: of seeds, at least 2.
    """
    quantile = stats.t.ppf(1 - LEVEL / 2, count - 1)
    shift = abs(difference) * math.sqrt(count) / deviation
    # The other tail is below LEVEL / 2 and shrinks with the shift; scipy returns NaN where it is too small.
    other_tail = float(np.nan_to_num(stats.nct.cdf(-quantile, count - 1, shift)))
    return float(stats.nct.sf(quantile, count - 1, shift)) + other_tail


def seeds_to_tell(difference: float, deviation: float) -> int | None:
    """The smallest number of seeds whose `power` reaches POWER; None above MOST_SEEDS.

    Args:
      difference: in nats, not 0.
      deviation: the standard deviation of the paired differences.
    """
    if deviation == 0:
        return 2
    # Student's t needs at least as many seeds as the normal distribution, and about two more.
    normal = ((stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)) * deviation / difference) ** 2
    if normal > MOST_SEEDS:
        return None
    count = max(2, math.floor(normal))
    while power(difference, deviation, count) < POWER:
        count += 1
    return count if count <= MOST_SEEDS else None


def told_difference(deviation: float, count: int) -> float:
    """The smallest true difference in nats that so many seeds, at least 2, find with probability POWER."""
    if deviation == 0:
        return 0.0
    low, high = 0.0, deviation
    while power(high, deviation, count) < POWER:
        high *= 2
    # 60 halvings leave less than a rounding error of float64.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, deviation, count) < POWER else (low, middle)
    return high


def deviation_range(count: int, confidence: float = 0.95) -> Interval:
    """Between which multiples of the sample standard deviation of n normal values the true one lies.

    sqrt((n - 1) / q), with q the quantiles of chi squared, n - 1 degrees of freedom.
    """
    tail = (1 - confidence) / 2
    high, low = (math.sqrt((count - 1) / float(stats.chi2.ppf(share, count - 1))) for share in (tail, 1 - tail))
    return Interval(low, high)
