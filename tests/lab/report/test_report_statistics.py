"""The report's statistics against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from hybridnorm_jax.lab import groups
from hybridnorm_jax.lab.report import statistics
from hybridnorm_jax.lab.run_files import Point


def _finished(losses):
    """Runs with seeds 0, 1, ... that finished with these losses."""
    return groups.RunGroup(losses=dict(enumerate(map(float, losses))), diverged={}, unfinished=())


def test_intervals_agree_with_scipy():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(3.0, 0.1, 6), rng.normal(3.1, 0.1, 6)
    our_runs, their_runs = _finished(ours), _finished(theirs)
    difference = statistics.paired_difference(our_runs, their_runs)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    np.testing.assert_allclose(difference.inference.interval, (interval.low, interval.high), rtol=1e-12)
    assert difference.deviation == pytest.approx(np.std(ours - theirs, ddof=1), rel=1e-12)
    another_seed = groups.RunGroup(losses={9: 1.0}, diverged={}, unfinished=())
    assert statistics.paired_difference(our_runs, another_seed) is None


@pytest.mark.parametrize("count", [0, 5, 500, 1001, 2500])
def test_spike_score_is_the_share_of_values_seven_deviations_from_the_thousand_before(count):
    rng = np.random.default_rng(count)
    values = rng.normal(3.0, 0.1, count)
    values[rng.random(count) < 0.02] += 1.5
    values[rng.random(count) < 0.01] = np.nan
    finite = values[np.isfinite(values)]
    windows = [(value, finite[max(0, end - 1000) : end]) for end, value in enumerate(finite) if end >= 10]
    spikes = count - len(finite) + sum(abs(value - window.mean()) >= 7 * window.std() for value, window in windows)
    score = statistics.spike_score(Point(step, value) for step, value in enumerate(values))
    assert score == (100 * spikes / count if count else None)
    assert count < 1000 or score > 1


def test_smoothing_is_a_trailing_mean_of_what_is_finite():
    series = [Point(1, 2.0), Point(2, 4.0), Point(3, math.nan), Point(4, 6.0), Point(10, 1.0)]
    smooth = groups.smoothed(series, np.array([1, 2, 3, 4, 8, 10]), window=2)
    np.testing.assert_allclose(smooth, [2, 3, 4, 6, math.nan, 1])


def test_labels_are_ordered_by_their_numbers():
    labels = ["pre, d_model=128", "pre, d_model=64", "pre", "hybrid, clip=0.5", "hybrid, clip=0.25", "b2t"]
    assert sorted(labels, key=statistics.natural_order) == [
        "b2t",
        "hybrid, clip=0.25",
        "hybrid, clip=0.5",
        "pre",
        "pre, d_model=64",
        "pre, d_model=128",
    ]
