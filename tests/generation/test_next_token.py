"""Every rule of sampling against its definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.generation.next_token import choose, keep_min_p, keep_top_k, keep_top_p, penalize

LOGITS = np.random.default_rng(0).normal(0, 2, (4, 23)).astype(np.float32)


def _softmax(row):
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def _kept(logits):
    return np.isfinite(np.asarray(logits))


@pytest.mark.parametrize("k", [1, 5, 23, 100])
def test_top_k(k):
    expected = [np.argsort(np.argsort(-row)) < k for row in LOGITS]
    np.testing.assert_array_equal(_kept(keep_top_k(jnp.asarray(LOGITS), k)), expected)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_has_the_probability(p):
    for row, kept in zip(LOGITS, _kept(keep_top_p(jnp.asarray(LOGITS), p)), strict=True):
        order = np.argsort(-row)
        together = np.cumsum(_softmax(row)[order])
        size = int(np.searchsorted(together, p)) + 1
        assert set(np.flatnonzero(kept)) == set(order[:size])


@pytest.mark.parametrize("p", [0.02, 0.5, 1.0])
def test_min_p(p):
    expected = [_softmax(row) >= p * _softmax(row).max() * (1 - 1e-6) for row in LOGITS]
    np.testing.assert_array_equal(_kept(keep_min_p(jnp.asarray(LOGITS), p)), expected)


def test_a_penalty_makes_what_came_less_likely_whatever_its_sign():
    came = np.random.default_rng(1).random(LOGITS.shape) < 0.5
    expected = np.where(came, np.where(LOGITS > 0, LOGITS / 1.7, LOGITS * 1.7), LOGITS)
    np.testing.assert_allclose(penalize(jnp.asarray(LOGITS), jnp.asarray(came), 1.7), expected, rtol=1e-6)


def test_tokens_are_drawn_as_often_as_the_rules_say():
    """20,000 draws from one row: each frequency within five of its standard deviations."""
    count, sampling = 20_000, hn.Sampling(temperature=0.7, top_k=6, min_p=0.05)
    keys = jax.random.split(jax.random.key(0), count)
    drawn = choose(jnp.broadcast_to(jnp.asarray(LOGITS[0]), (count, 23)), keys, sampling)
    row = LOGITS[0] / 0.7
    row = np.where(np.argsort(np.argsort(-row)) < 6, row, -np.inf)
    expected = _softmax(row)
    expected = np.where(expected >= 0.05 * expected.max(), expected, 0)
    expected /= expected.sum()
    found = np.bincount(drawn, minlength=23) / count
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_hardly_any_temperature_takes_the_likeliest():
    """Divided by so little, logits would be infinite, and their softmax NaN."""
    keys = jax.random.split(jax.random.key(0), 4)
    cold = hn.Sampling(temperature=1e-38, top_k=20, top_p=0.9, min_p=0.1)
    np.testing.assert_array_equal(choose(jnp.asarray(100 * LOGITS), keys, cold), LOGITS.argmax(-1))


def test_without_a_temperature_the_likeliest_is_taken_after_the_penalty():
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(choose(jnp.asarray(LOGITS), keys, hn.Sampling()), LOGITS.argmax(-1))
    came = np.eye(23, dtype=bool)[LOGITS.argmax(-1)]
    second = choose(jnp.asarray(LOGITS), keys, hn.Sampling(repetition_penalty=100.0), came=jnp.asarray(came))
    np.testing.assert_array_equal(second, np.argsort(-LOGITS)[:, 1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"min_p": 1.5}, "min_p=1.5: must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_name_their_field(keys, message):
    with pytest.raises(hn.ConfigError, match=message):
        hn.Sampling(**keys)
