"""Parameters that are rounded once give what those give that are rounded at every use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.generation.rounded_parameters import rounded


@pytest.mark.parametrize(
    "keys",
    [
        {"tie_embeddings": True},
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "norm": "layernorm",
            "positions": "learned",
            "max_positions": 16,
        },
        {"num_experts": 4, "experts_per_token": 2, "shared_experts": 1, "mlp_bias": True},
    ],
    ids=["tied", "biases", "experts"],
)
def test_rounding_once_changes_no_bit(keys, small_config, random_params, tokens):
    config = small_config(scheme="hybrid", dtype="bfloat16", num_layers=2, **keys)
    params = random_params(config)
    narrow = rounded(config, params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(narrow)) < 0.6 * sum(
        leaf.nbytes for leaf in jax.tree.leaves(params)
    )
    forward = jax.jit(lambda params: hn.Decoder(config).apply({"params": params}, tokens))
    np.testing.assert_array_equal(forward(narrow), forward(params))


def test_nothing_is_widened_or_copied(small_config, random_params):
    config = small_config(dtype="float32", param_dtype="bfloat16")
    params = jax.tree.map(jnp.asarray, random_params(config))
    assert all(a is b for a, b in zip(jax.tree.leaves(rounded(config, params)), jax.tree.leaves(params), strict=True))
