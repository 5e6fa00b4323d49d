"""Epochs are permutations that look drawn by chance, at every size of a source."""

import itertools

import numpy as np
import pytest

from hybridnorm_jax.config.resume_keys import resume_differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.data.rows.order import EpochOrder

ROUNDS = RunConfig().train.shuffle_rounds
# 65,000 is nearly 2^16 and 250 million nearly 2^28: the cipher permutes 2^(2k) places, where these lie near together.
SIZES = [700, 12_000, 65_000, 260_000, 250_000_000, 10**10]
BATCH, BINS = 64, 16


class _Rows:
    """As many rows as one likes, none of which is read."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count


def _places(count, seed, first, *, epoch=0):
    """Where a batch of an epoch reads, as shares of the source."""
    order = EpochOrder(_Rows(count), seed, rounds=ROUNDS)
    return np.array([order.place(epoch * count + first + row).index for row in range(BATCH)]) / count


def _batches(count):
    """At the beginning of the first epochs of twenty seeds, and in their middles."""
    return [_places(count, seed, first) for seed in range(20) for first in (0, count // 2)]


@pytest.mark.parametrize("count", SIZES)
def test_a_batch_comes_from_all_parts_of_a_source(count):
    """Of 40 batches the sum of chi^2 over 16 bins has 600 degrees of freedom: mean 600, variance 1,200."""
    counts = np.array([np.histogram(places, bins=BINS, range=(0, 1))[0] for places in _batches(count)])
    chi_squared = (np.square(counts - BATCH / BINS) / (BATCH / BINS)).sum()
    assert abs(chi_squared - 600) < 5 * np.sqrt(1200)


@pytest.mark.parametrize("count", SIZES)
def test_rows_that_follow_each_other_are_no_neighbours(count):
    """Two places drawn by chance lie within 1/50 of each other with probability 1 - (1 - 1/50)^2."""
    near = [abs(one - other) < 1 / 50 for places in _batches(count) for one, other in itertools.pairwise(places)]
    chance = 1 - (1 - 1 / 50) ** 2
    assert abs(sum(near) - len(near) * chance) < 5 * np.sqrt(len(near) * chance * (1 - chance))


@pytest.mark.parametrize("count", SIZES)
def test_epochs_are_not_alike(count):
    """A correlation of 64 independent pairs has a variance of about 1/63."""
    alike = [
        np.corrcoef(_places(count, seed, 0), _places(count, seed, 0, epoch=epoch))[0, 1]
        for seed in range(20)
        for epoch in (1, 2)
    ]
    assert max(map(abs, alike)) < 5 / np.sqrt(63)
    assert np.mean(np.square(alike)) < (1 + 5 * np.sqrt(2 / len(alike))) / 63


def test_a_run_that_was_saved_without_the_number_of_rounds_had_four():
    asked = RunConfig()
    text = to_yaml(asked).replace("  shuffle_rounds: 16\n", "")
    assert "shuffle_rounds" not in text
    saved = from_yaml(text)
    assert saved.train.shuffle_rounds == 4
    assert resume_differences(saved, asked, 10) == ["train.shuffle_rounds: saved 4, asked 16"]
    assert from_yaml(text, ["train.shuffle_rounds=8"]).train.shuffle_rounds == 8
    assert from_yaml(to_yaml(asked)) == asked
