"""The rules by which a token is chosen, against plain NumPy, one row and one token at a time."""

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.generation.next_token import choose, keep_min_p, keep_top_k, keep_top_p, penalize

ROWS, VOCABULARY = 6, 12


@pytest.fixture
def logits():
    """Rows with ties, with one token that is nearly certain, and with all alike."""
    rows = np.random.default_rng(0).normal(size=(ROWS, VOCABULARY)).astype(np.float32) * 2
    rows[1] = np.round(rows[1])
    rows[2, 3] = 30
    rows[3] = 0
    return rows


def softmax(row):
    """Probabilities of one row, in float64."""
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def kept(rows):
    """Which logits were left."""
    return np.isfinite(np.asarray(rows))


@pytest.mark.parametrize("k", [1, 3, VOCABULARY, VOCABULARY + 5])
def test_top_k_leaves_the_largest_and_their_equals(k, logits):
    for row, left in zip(logits, kept(keep_top_k(logits, k)), strict=True):
        least = sorted(row)[-min(k, VOCABULARY)]
        np.testing.assert_array_equal(left, row >= least)


@pytest.mark.parametrize("p", [0.01, 0.4, 0.9, 0.999])
def test_top_p_leaves_the_smallest_set_that_is_likely_enough(p, logits):
    for row, left in zip(logits, kept(keep_top_p(logits, p)), strict=True):
        order = np.argsort(-row, kind="stable")
        total, least = 0.0, None
        for token in order:
            if total >= p - 1e-6:
                break
            total, least = total + softmax(row)[token], row[token]
        np.testing.assert_array_equal(left, row >= least)


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_leaves_what_is_not_much_less_likely_than_the_likeliest(p, logits):
    for row, left in zip(logits, kept(keep_min_p(logits, p)), strict=True):
        likely = softmax(row)
        np.testing.assert_array_equal(left, likely >= p * likely.max() * (1 - 1e-6))


def test_a_penalty_lowers_what_came(logits):
    came = np.random.default_rng(1).random(logits.shape) < 0.5
    penalized = np.asarray(penalize(logits, came, 1.7))
    for row in range(ROWS):
        for token in range(VOCABULARY):
            value = logits[row, token]
            if came[row, token]:
                value = value / 1.7 if value > 0 else value * 1.7
            assert penalized[row, token] == pytest.approx(value, rel=1e-6)
    assert (penalized <= logits).all()


def test_what_is_left_was_made_so_by_all_rules_in_their_order(logits):
    """The probabilities of 4,000 draws are those of the rules, applied one after the other."""
    sampling = hn.Sampling(temperature=0.7, top_k=8, top_p=0.8, min_p=0.1, repetition_penalty=1.3)
    came = np.arange(VOCABULARY) % 3 == 0
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    for row in logits:
        rows, all_came = np.broadcast_to(row, (draws, VOCABULARY)), np.broadcast_to(came, (draws, VOCABULARY))
        chosen = jax.jit(lambda rows, came: choose(rows, keys, sampling, came=came))(rows, all_came)
        found = np.bincount(chosen, minlength=VOCABULARY) / draws
        expected = reference(row, came, sampling)
        assert found[expected == 0].sum() == 0
        # The standard deviation of a frequency is at most sqrt(1/4 / 4000) = 0.008.
        np.testing.assert_allclose(found, expected, atol=5 * 0.008)


def reference(row, came, sampling):
    """The probabilities of one row's tokens, in NumPy."""
    row = row.astype(np.float64)
    row = np.where(came, np.where(row > 0, row / sampling.repetition_penalty, row * sampling.repetition_penalty), row)
    row = row / sampling.temperature
    row = np.where(row >= sorted(row)[-sampling.top_k], row, -np.inf)
    order = np.argsort(-row, kind="stable")
    before = np.cumsum(softmax(row)[order]) - softmax(row)[order]
    row = np.where(row >= row[order][before < sampling.top_p - 1e-6].min(), row, -np.inf)
    likely = softmax(row)
    return (
        np.where(likely >= sampling.min_p * likely.max(), likely, 0)
        / likely[likely >= sampling.min_p * likely.max()].sum()
    )


def test_without_temperature_the_likeliest_is_taken_whatever_the_key(logits):
    keys = jax.random.split(jax.random.key(0), ROWS)
    np.testing.assert_array_equal(choose(logits, keys, hn.Sampling()), logits.argmax(-1))
    cold = hn.Sampling(temperature=1e-30, top_p=0.9, min_p=0.1)
    alone = [0, 2, 4, 5]  # the rows with one likeliest token
    np.testing.assert_array_equal(np.asarray(choose(logits, keys, cold))[alone], logits.argmax(-1)[alone])
