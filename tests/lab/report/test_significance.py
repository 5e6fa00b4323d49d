"""Intervals, p-values, Holm's correction and power: against scipy, published tables and numbers computed by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from hybridnorm_jax.lab.report import significance


def test_few_seeds_get_students_interval_and_test():
    differences = np.array([-0.10, -0.20, -0.06])
    found = significance.infer(differences)
    expected = stats.ttest_1samp(differences, 0)
    interval = expected.confidence_interval(0.95)
    # Both are float64 and compute the same formula.
    np.testing.assert_allclose(found.interval, (interval.low, interval.high), rtol=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    # By hand: mean -0.12, variance 0.0052, t(2, 97.5 %) = 4.302653 (any table).
    assert found.interval.high == pytest.approx(-0.12 + 4.302653 * math.sqrt(0.0052 / 3), abs=1e-7)


def test_more_than_ten_seeds_get_the_bootstrap():
    differences = np.random.default_rng(1).exponential(1.0, 24) - 0.6
    found = significance.infer(differences)
    resamples = np.random.default_rng(2).choice(differences, (99_999, 24))
    low, high = np.quantile(stats.ttest_1samp(resamples, differences.mean(), axis=1).statistic, [0.025, 0.975])
    error = stats.sem(differences)
    expected = differences.mean() - np.array([high, low]) * error
    # An end of the interval, a quantile of 9,999 values of t, is itself random: its standard deviation is
    # sqrt(0.025 * 0.975 / 9999) / density = 0.0016 / 0.02 standard errors, where the tail is long. Four of these.
    np.testing.assert_allclose(found.interval, expected, atol=4 * 0.08 * error)
    assert found == significance.infer(differences)
    # Skewed to the right: the true mean may lie further above the sample's than Student's interval says.
    assert found.interval.high > significance.student(differences).interval.high
    assert significance.infer(differences[:10]) == significance.student(differences[:10])


def test_eleven_seeds_find_nothing_where_nothing_is(monkeypatch):
    monkeypatch.setattr(significance, "RESAMPLES", 999)
    drawn = np.random.default_rng(0).normal(0, 1, size=(1000, 11))
    found = np.mean([significance.infer(each).p < 0.05 for each in drawn])
    # The standard deviation of a share of 1,000 about 5 % is 0.7 %: four of these. Corrected percentiles find 10 %.
    assert 0.022 < found < 0.078


def test_resamples_cannot_tell_a_p_below_two_in_their_number():
    clear = 1 + 1e-3 * np.random.default_rng(0).normal(0, 1, 11)
    assert significance.infer(clear).p == 2 / (significance.RESAMPLES + 1)
    # One far value among equal ones: many resamples have no spread.
    low, high = significance.infer(np.array([0.01] * 10 + [0.2])).interval
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize("shift", [-0.7, -0.3, 0.2, 0.9])
@pytest.mark.parametrize("count", [5, 15])
def test_the_interval_leaves_zero_out_exactly_where_p_is_below_its_level(count, shift):
    differences = np.random.default_rng(count).gamma(2.0, 1.0, count) - 2 + shift
    p = significance.infer(differences).p
    # Of 9,999 resamples the quantile next to p is at most 1e-4 away in each tail.
    for level, leaves_out in ((p * 1.05 + 1e-3, True), (p * 0.95 - 1e-3, False)):
        if 0 < level < 1:
            low, high = significance.infer(differences, 1 - level).interval
            assert (low > 0 or high < 0) == leaves_out


def test_equal_differences_and_one_seed():
    assert significance.infer(np.array([0.5])) is None
    assert significance.infer(np.full(3, 0.25)) == ((0.25, 0.25), 0)
    assert significance.infer(np.zeros(12)) == ((0, 0), 1)


def test_holm_is_that_computed_by_hand():
    # 4 x 0.01, 3 x 0.02, 2 x 0.03 (not below the one before), 1 x 0.5.
    assert significance.holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert significance.holm([0.04]) == [0.04]
    assert significance.holm([]) == []
    assert significance.holm([0.6, 0.9]) == [1, 1]


@pytest.mark.parametrize(("effect", "count"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_are_those_of_published_tables(effect, count):
    """G*Power's numbers for a paired t-test, two-sided 5 %, power 80 %."""
    assert significance.seeds_to_tell(0.01, 0.01 / effect) == count
    assert significance.power(effect, 1.0, count) >= 0.8 > significance.power(effect, 1.0, count - 1)


def test_the_difference_that_seeds_tell_is_the_one_that_needs_them():
    for count in (2, 3, 5, 12):
        told = significance.told_difference(0.03, count)
        assert significance.power(told, 0.03, count) == pytest.approx(0.8, abs=1e-9)
        assert significance.seeds_to_tell(told * 1.0001, 0.03) == count
    assert significance.told_difference(0.0, 3) == 0
    assert significance.seeds_to_tell(0.01, 0.0) == 2
    assert significance.seeds_to_tell(0.01, 1e4) is None


def test_power_is_the_share_of_experiments_that_find_the_difference():
    drawn = np.random.default_rng(0).normal(0.04, 0.03, size=(20_000, 4))
    found = stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05
    # The standard deviation of a share of 20,000 is below 0.0036: four of these.
    assert found.mean() == pytest.approx(significance.power(0.04, 0.03, 4), abs=0.015)


def test_how_well_a_deviation_is_known():
    # chi squared with 2 degrees of freedom: -2 log(1 - share), so the quantiles are 0.050636 and 7.377759.
    low, high = significance.deviation_range(3)
    assert (low, high) == pytest.approx((math.sqrt(2 / 7.377759), math.sqrt(2 / 0.050636)), rel=1e-5)
