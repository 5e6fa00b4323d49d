"""Models of LayerNorm with drawn parameters, and what they compute: for tests that compare forms."""

import jax

import hybridnorm_jax as hn


def layernorm_model(small_config, random_params, keys, dtype="float64"):
    config = small_config(norm="layernorm", dtype=dtype, param_dtype=dtype, **keys)
    return config, random_params(config)


def logits(config, params, tokens):
    return jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
