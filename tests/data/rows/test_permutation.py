"""Many places of Grain's permutation at once are those that Grain gives one by one."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from hybridnorm_jax.data.rows import permutation
from hybridnorm_jax.data.rows.permutation import permuted, permuted_place

# Around the counts for which the cipher's blocks become longer, where a block has far more numbers than there are
# places, so that they are encrypted several times, and where a half no longer fits a table.
COUNTS = [3, 100, 9000, *range(2**16 - 1, 2**16 + 3), *range(2**18, 2**18 + 3), 10**7, 2**24 + 2, 2**32 + 2, 2**40 + 1]
# Counts for which Grain's result is no permutation.
LACKING = (2**16 + 1, 2**18 + 1, 2**40 + 1)


@pytest.mark.parametrize("rounds", [4, 6, 16, 40, 128])
@pytest.mark.parametrize("count", COUNTS)
def test_places_are_those_of_grain(count, rounds, monkeypatch):
    monkeypatch.setattr(permutation, "FEW", 0)
    drawn = np.random.default_rng(count).integers(0, count, 60)
    places = np.unique([0, count - 1, *drawn.tolist()])
    for seed in (1, 2**32 - 1):
        # Of one place more Grain's cipher has the bits that it needs.
        last = count if count in LACKING else count - 1
        expected = [index_shuffle(place, max_index=last, seed=seed, rounds=rounds) for place in places.tolist()]
        expected = [
            index_shuffle(place, max_index=last, seed=seed, rounds=rounds) if place == count else place
            for place in expected
        ]
        assert permuted(places, count=count, seed=seed, rounds=rounds).tolist() == expected
        one_by_one = [permuted_place(place, count=count, seed=seed, rounds=rounds) for place in places.tolist()]
        assert one_by_one == expected


def test_the_last_places_of_a_walk_are_grains():
    places = np.arange(1000)
    expected = [index_shuffle(place, max_index=10**7, seed=3, rounds=16) for place in range(1000)]
    assert permuted(places, count=10**7 + 1, seed=3, rounds=16).tolist() == expected
    assert permuted(np.zeros(3, int), count=1, seed=3, rounds=16).tolist() == [0, 0, 0]
    assert permuted_place(0, count=1, seed=3, rounds=16) == 0


@pytest.mark.parametrize("count", [1, 2, 65_536, 65_537, 65_538, 131_073, 262_144, 262_145])
@pytest.mark.parametrize("few", [0, 8])
def test_every_place_comes_once(count, few, monkeypatch):
    monkeypatch.setattr(permutation, "FEW", few)
    found = permuted(np.arange(count), count=count, seed=7, rounds=16)
    np.testing.assert_array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("count", [65_537, 262_145])
def test_every_place_comes_once_where_grain_leaves_one_out(count):
    """The two that are put together by Grain are its first and its last."""
    grains = [index_shuffle(place, max_index=count - 1, seed=7, rounds=16) for place in (0, count - 1)]
    assert grains[0] == grains[1]
    ours = [permuted_place(place, count=count, seed=7, rounds=16) for place in (0, count - 1)]
    assert ours == permuted(np.array([0, count - 1]), count=count, seed=7, rounds=16).tolist()
    assert ours[0] != ours[1]
