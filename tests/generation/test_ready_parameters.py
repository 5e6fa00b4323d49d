"""Parameters as generation reads them give what those give that a run trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.generation.ready_parameters import ready, rounded
from hybridnorm_jax.model.cache import Slots


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


@pytest.mark.parametrize("scheme", ["hybrid_star", "deepnorm", "mix_ln"])
def test_each_layer_has_its_own_arrays_and_the_model_is_the_same(scheme, small_config, random_params, tokens):
    """Of one run of layers and of several, with scales that differ from layer to layer."""
    config = small_config(scheme=scheme, num_layers=4)
    params = random_params(config)
    split = ready(config, params)
    assert {name for name in split if name.startswith(("run", "layer"))} == {f"layer_{number}" for number in range(4)}
    ours = jax.jit(lambda split: hn.Decoder(config, unrolled=True).apply({"params": split}, tokens))(split)
    looped = jax.jit(lambda params: hn.Decoder(config).apply({"params": params}, tokens))(params)
    np.testing.assert_allclose(ours, looped, rtol=1e-6, atol=1e-6 * np.abs(looped).max())


def test_what_is_ready_is_not_copied_again(small_config, random_params):
    config = small_config(dtype="bfloat16", num_layers=2)
    split = ready(config, random_params(config))
    assert split["layer_1"]["attention"]["query"]["kernel"].dtype == "bfloat16"
    assert ready(config, split) is split


def test_parameters_stay_where_they_lie_on_a_mesh(small_config, random_params):
    config = small_config(num_layers=2)
    params = random_params(config)
    params = jax.device_put(params, hn.tree_shardings(params, hn.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})))
    stacked = params["run_0"]["attention"]["query"]["kernel"]
    split = ready(config, params)["layer_0"]["attention"]["query"]["kernel"]
    assert stacked.sharding.shard_shape(stacked.shape)[1:] == split.sharding.shard_shape(split.shape) != split.shape


def test_a_loop_over_layers_keeps_nothing(small_config, random_params, tokens):
    config = small_config(num_layers=2)
    slots = Slots(next=jnp.asarray(0), first=jnp.zeros(len(tokens), int))
    with pytest.raises(ValueError, match=r"slots: .* build it with unrolled=True"):
        hn.Decoder(config).apply({"params": random_params(config)}, tokens, slots=slots)
