"""Which source each row of a run is of: closed forms against counting, and against the shares asked for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnorm_jax.data.rows.allotment import Allotment, Stage

SHARES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=9).filter(any)


@st.composite
def runs(draw):
    """(stages in steps, batch size, steps): up to three stages of the same sources."""
    first = draw(SHARES)
    same_length = st.lists(st.floats(0, 100), min_size=len(first), max_size=len(first)).filter(any)
    lengths = draw(st.lists(st.integers(1, 40), max_size=2))
    shares = [first, *(draw(same_length) for _ in lengths)]
    firsts = np.cumsum([0, *lengths]).tolist()
    batch_size = draw(st.integers(1, 50))
    stages = [Stage(step * batch_size, tuple(each)) for step, each in zip(firsts, shares, strict=True)]
    return stages, batch_size, firsts[-1] + draw(st.integers(1, 40))


def batches(stages, batch_size, steps, *, seed=0):
    allotment = Allotment(stages, seed)
    return [allotment.batch(step * batch_size, (step + 1) * batch_size) for step in range(steps)]


@settings(max_examples=60, deadline=None)
@given(runs())
def test_every_source_gives_its_rows_in_order_and_as_many_as_the_closed_form_says(run):
    stages, batch_size, steps = run
    allotment = Allotment(stages, seed=0)
    counts = np.zeros(len(stages[0].shares), np.int64)
    for step, batch in enumerate(batches(stages, batch_size, steps)):
        np.testing.assert_array_equal(allotment.taken(step * batch_size), counts)
        for source in range(len(counts)):
            given = np.sort(batch.index[batch.source == source])
            np.testing.assert_array_equal(given, counts[source] + np.arange(len(given)))
            counts[source] += len(given)
    np.testing.assert_array_equal(allotment.taken(steps * batch_size), counts)


@settings(max_examples=60, deadline=None)
@given(SHARES, st.integers(0, 10**15), st.integers(1, 10**6))
def test_over_any_stretch_the_shares_are_exact_to_rounding(shares, start, rows):
    """Both ends of a stretch are off by at most half a row for each time that the source was split from others."""
    allotment = Allotment([Stage(0, tuple(shares))], seed=0)
    found = allotment.taken(start + rows) - allotment.taken(start)
    asked = rows * np.array(shares) / math.fsum(shares)
    # A share is kept as a multiple of 2^-40, which is 1e-6 rows of 10^6.
    limit = 2 * (math.ceil(math.log2(len(shares))) / 2) + 1e-3
    assert np.abs(found - asked).max() <= limit
    assert found.sum() == rows
    assert not found[np.array(shares) == 0].any()


def test_a_stage_goes_on_where_the_one_before_it_ended():
    """By hand: two sources in turn, then the second one alone."""
    stages = [Stage(0, (1, 1)), Stage(4, (0, 1)), Stage(6, (1, 0))]
    found = batches(stages, batch_size=2, steps=4)
    rows = [sorted(zip(batch.source.tolist(), batch.index.tolist(), strict=True)) for batch in found]
    assert rows == [[(0, 0), (1, 0)], [(0, 1), (1, 1)], [(1, 2), (1, 3)], [(0, 2), (0, 3)]]


def test_other_batches_read_the_same_rows():
    stages = [Stage(0, (0.7, 0.2, 0.1)), Stage(480, (0.1, 0.4, 0.5))]

    def read(batch_size, rows):
        found = batches(stages, batch_size, rows // batch_size)
        return {(int(s), int(i)) for batch in found for s, i in zip(batch.source, batch.index, strict=True)}

    for rows in (96, 480, 960):
        assert read(6, rows) == read(16, rows) == read(48, rows)


def test_the_order_inside_a_batch_follows_from_the_seed():
    stages = [Stage(0, (1, 1))]
    one, again, other = (
        np.concatenate([batch.source for batch in batches(stages, 8, 50, seed=seed)]).reshape(50, 8)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one.sum(axis=1) == 4).all()
    # No place of a batch, and so no device, has the same source in every step.
    assert ((one.mean(axis=0) > 0.2) & (one.mean(axis=0) < 0.8)).all()


@pytest.mark.parametrize("weight", [1e-6, 1e-9])
def test_a_tiny_share_is_read_and_not_rounded_away(weight):
    allotment = Allotment([Stage(0, (weight, 1 - weight))], seed=0)
    rows = round(1000 / weight)
    assert abs(int(allotment.taken(rows)[0]) - 1000) <= 1


def test_a_source_without_a_share_in_a_stage_changes_nothing_for_the_others():
    """So a source may be added for a later stage while the run goes on."""
    two = batches([Stage(0, (0.3, 0.7))], 16, 20)
    three = batches([Stage(0, (0.3, 0.0, 0.7)), Stage(320, (0.3, 0.5, 0.2))], 16, 20)
    for before, after in zip(two, three, strict=True):
        np.testing.assert_array_equal(before.source, after.source // 2)
        np.testing.assert_array_equal(before.index, after.index)
