"""Scores and samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.evaluation.perplexity import Score, evaluate, table
from hybridnorm_jax.generation.sampling import generate
from hybridnorm_jax.model.loss import LossSums


def test_a_score_weighs_tokens_and_not_batches():
    sums = [
        LossSums(jnp.float32(nll), jnp.float32(0), jnp.float32(weight)) for nll, weight in ((30, 10), (1, 1), (0, 0))
    ]
    score = evaluate(lambda batch: sums[batch], [0, 1, 2], bytes_per_token=2.0)
    assert score.loss == pytest.approx(31 / 11)
    assert score.perplexity == pytest.approx(math.exp(31 / 11))
    assert score.bits_per_byte == pytest.approx(31 / 11 / math.log(2) / 2)
    assert score.tokens == 11
    assert evaluate(lambda batch: sums[batch], [0]).bits_per_byte is None


def test_the_table_shows_every_set():
    text = table({"validation": Score(1.5, math.exp(1.5), None, 1000), "c4": Score(2.0, math.exp(2), 1.0, 5)})
    assert [line.split()[0] for line in text.splitlines()] == ["set", "validation", "c4"]
    assert "1,000" in text
    assert "4.482" in text


@pytest.fixture(scope="module")
def counting_model():
    """Parameters with which token t is followed by t + 1 with near certainty: no branch writes, the head is shifted."""
    config = hn.ModelConfig(scheme="pre", d_model=16, num_layers=1, num_heads=2, mlp_dim=8, vocab_size=16)
    params = hn.Decoder(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    for branch, name in (("attention", "out"), ("feed_forward", "down")):
        params["run_0"][branch][name]["kernel"] *= 0
    params["token_embedding"]["embedding"] = jnp.eye(16)
    params["head"]["kernel"] = 40 * jnp.roll(jnp.eye(16), 1, axis=1)
    return config, params


@pytest.mark.parametrize("window", [4, 32])
def test_a_sample_continues_its_prompt_past_the_window(window, counting_model):
    config, params = counting_model
    drawn = generate(config, params, np.array([3, 4, 5]), num_tokens=20, window=window, key=jax.random.key(0))
    np.testing.assert_array_equal(drawn, np.arange(6, 26) % 16)


def test_temperature_and_key_decide_the_sample(counting_model):
    config, params = counting_model

    def draw(seed, temperature):
        at = {"num_tokens": 12, "window": 8, "key": jax.random.key(seed), "temperature": temperature}
        return generate(config, params, np.array([0]), **at).tolist()

    assert draw(0, 1e3) == draw(0, 1e3)
    assert draw(0, 1e3) != draw(1, 1e3)
    assert draw(0, 1e-3) == draw(1, 1e-3)
