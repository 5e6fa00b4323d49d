"""The lab's statistics against scipy and by hand; line styles; Markdown."""

import math

import numpy as np
import pytest
from scipy import stats

from hybridnorm_jax.lab import page, statistics, styles


def test_styles_are_fixed_distinct_and_told_apart_without_color():
    fixed = [(str(style.linestyle), style.marker) for style in styles.FIXED.values()]
    assert len({marker for _, marker in fixed}) == len(fixed)
    unknown = [f"scheme {number}" for number in range(30)]
    assert [styles.style_of(label) for label in unknown] == [styles.style_of(label) for label in unknown]
    chosen = styles.styles_of([*styles.FIXED, *unknown])
    assert len({(str(style.linestyle), style.marker) for style in chosen.values()}) == len(chosen)
    assert chosen["hybrid"] == styles.style_of("hybrid") == styles.FIXED["hybrid"]


def test_intervals_agree_with_scipy():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(3.0, 0.1, 6), rng.normal(3.1, 0.1, 6)
    cells = [statistics.Cell(dict(enumerate(map(float, losses))), {}, ()) for losses in (ours, theirs)]
    difference = statistics.paired_difference(*cells)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    bounds = difference.mean - difference.half_width, difference.mean + difference.half_width
    np.testing.assert_allclose(bounds, (interval.low, interval.high), rtol=1e-12)
    assert statistics.paired_difference(cells[0], statistics.Cell({9: 1.0}, {}, ())) is None


@pytest.mark.parametrize("count", [0, 5, 500, 1001, 2500])
def test_spike_score_is_the_share_of_values_seven_deviations_from_the_thousand_before(count):
    rng = np.random.default_rng(count)
    values = rng.normal(3.0, 0.1, count)
    values[rng.random(count) < 0.02] += 1.5
    values[rng.random(count) < 0.01] = np.nan
    finite = values[np.isfinite(values)]
    windows = [(value, finite[max(0, end - 1000) : end]) for end, value in enumerate(finite) if end >= 10]
    spikes = count - len(finite) + sum(abs(value - window.mean()) >= 7 * window.std() for value, window in windows)
    score = statistics.spike_score(enumerate(values))
    assert score == (100 * spikes / count if count else None)
    assert count < 1000 or score > 1


def test_smoothing_is_a_trailing_mean_of_what_is_finite():
    series = [(1, 2.0), (2, 4.0), (3, math.nan), (4, 6.0), (10, 1.0)]
    smooth = statistics.smoothed(series, np.array([1, 2, 3, 4, 8, 10]), window=2)
    np.testing.assert_allclose(smooth, [2, 3, 4, 6, math.nan, 1])


def test_code_in_markdown_survives_backticks():
    block = page.Listing([("a|b", "echo `x` ``y``")])
    assert page.to_markdown("t", [block]) == "# t\n\n- a\\|b: ``` echo `x` ``y`` ```\n"
