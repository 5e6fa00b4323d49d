"""A model that keeps keys and values computes what the whole pass computes, whatever the model is."""

import jax
import numpy as np
import pytest
from cached_logits import at_once_and_step_by_step

import hybridnorm_jax as hn
from hybridnorm_jax.model.cache import empty_cache

EXPERTS = {"num_experts": 4, "experts_per_token": 2}
LEARNED = {"positions": "learned", "max_positions": 12}
MODELS = {
    "experts_hybrid": {"scheme": "hybrid", **EXPERTS},
    "experts_span": {"scheme": "span", **EXPERTS, "normalize_expert_weights": True, "shared_experts": 1},
    "experts_with_biases": {"scheme": "pre", **EXPERTS, "mlp_bias": True, "balance_bias": True},
    "all_heads": {"scheme": "pre", "num_kv_heads": 4},
    "one_kv_head": {"scheme": "hybrid_star", "num_kv_heads": 1, "head_dim": 6},
    "learned_positions": {"scheme": "pre", **LEARNED},
    "learned_positions_with_offset": {"scheme": "post", **LEARNED, "position_offset": 2},
    "half_rotated": {"scheme": "hybrid", "rotary_fraction": 0.5},
    "layernorm": {"scheme": "hybrid_star", "norm": "layernorm", "norm_bias": True},
    "crmsnorm": {"scheme": "pre_qk_pre", "norm": "crmsnorm"},
    "biases_tied": {"scheme": "pre", "attention_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "unrolled": {"scheme": "span", "scan_unroll": 3},
    "embedding_norm": {"scheme": "pre", "embedding_norm": True},
}
# What is summed in another order in float32 differs by about 2^-24 of the largest number for each of a few operations.
TOLERANCE = 1e-5


def assert_equal(found, expected):
    """Equal up to rounding in float32, whose unit is the largest number there is."""
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=TOLERANCE * max(1, np.abs(right).max()))


@pytest.mark.parametrize("scheme", hn.SCHEMES)
def test_every_scheme_says_the_same_with_the_cache(scheme, small_config, random_params, tokens):
    config = small_config(scheme=scheme)
    at_once, stepped = at_once_and_step_by_step(config, random_params(config), tokens)
    assert_equal(stepped, at_once)


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model_says_the_same_with_the_cache(model, small_config, random_params, tokens):
    config = small_config(**MODELS[model])
    params = random_params(config)
    at_once, stepped = at_once_and_step_by_step(config, params, tokens, prompt=5, slots=15)
    assert_equal(stepped[0], at_once[0])
    full = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
    assert_equal(at_once[0], full)


@pytest.mark.parametrize("form", ["pre_rmsnorm", "pre_crmsnorm"])
def test_the_equivalent_forms_say_the_same_with_the_cache(form, small_config, random_params, tokens):
    config = small_config(scheme="pre", norm="layernorm", norm_bias=True, **LEARNED)
    conversion = hn.equivalence.conversion_of(config, form)
    params = random_params(config)
    at_once, stepped = at_once_and_step_by_step(conversion.config, conversion.convert(params), tokens)
    assert_equal(stepped, at_once)
    # In float32 the conversion itself is exact to rounding alone.
    full = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(stepped[0], full, rtol=0, atol=1e-4 * np.abs(full).max())


def test_the_cache_has_no_number_more_than_it_needs(small_config):
    config = small_config(scheme="mix_ln", num_layers=5, head_dim=6, dtype="bfloat16")
    cache = empty_cache(config, batch=3, slots=7)
    leaves = jax.tree.leaves(cache)
    assert sum(leaf.size for leaf in leaves) == 3 * 7 * config.num_kv_heads * 6 * 2 * 5
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
