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
    """The bias-corrected and accelerated (BCa) bootstrap of the mean: its interval, and the p that belongs to it.

    With m_b the means of RESAMPLES resamples, Phi the normal distribution, z0 = Phi^-1(share of m_b below the mean),
    a = sum u^3 / (6 (sum u^2)^1.5), u the differences from their mean (which is the jackknife's a for a mean), the
    interval's ends are the quantiles of the m_b at

        Phi(z0 + (z0 + z) / (1 - a (z0 + z)))    for z = Phi^-1(alpha / 2) and Phi^-1(1 - alpha / 2).

    p is twice the smaller alpha / 2 at which an end is 0: the same equation solved for z. The resamples are drawn with
    a fixed seed, so the same differences give the same interval. So many resamples cannot tell a p below 1 / RESAMPLES,
    which is the smallest one returned.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, equations 14.9 to 14.15 and section 15.4.
    """
    count, mean = len(differences), float(differences.mean())
    generator = np.random.default_rng(0)
    means = np.sort(differences[generator.integers(count, size=(RESAMPLES, count))].mean(axis=1))
    centered = differences - mean
    acceleration = float((centered**3).sum() / (6 * (centered**2).sum() ** 1.5))
    bias = _normal_score(means, mean)

    def end(probability: float) -> float:
        score = bias + float(stats.norm.ppf(probability))
        return float(np.quantile(means, stats.norm.cdf(bias + score / (1 - acceleration * score))))

    tail = (1 - confidence) / 2
    distance = _normal_score(means, 0.0) - bias
    side = float(stats.norm.cdf(distance / (1 + acceleration * distance) - bias))
    return Inference(Interval(end(tail), end(1 - tail)), p=max(1 / RESAMPLES, 2 * min(side, 1 - side)))


def _normal_score(means: Float[np.ndarray, "resamples"], value: float) -> float:
    """Phi^-1(share of the means below a value); values that are equal count half, and no share is 0 or 1."""
    below = np.searchsorted(means, value, side="left") + np.searchsorted(means, value, side="right")
    share = float(below) / (2 * len(means))
    least = 1 / (len(means) + 1)
    return float(stats.norm.ppf(min(max(share, least), 1 - least)))


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
