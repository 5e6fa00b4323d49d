"""Tokens that a model draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.generation.sampling import generate


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
        key = jax.random.key(seed)
        drawn = generate(config, params, np.array([0]), num_tokens=12, window=8, key=key, temperature=temperature)
        return drawn.tolist()

    assert draw(0, 1e3) == draw(0, 1e3)
    assert draw(0, 1e3) != draw(1, 1e3)
    assert draw(0, 1e-3) == draw(1, 1e-3)
