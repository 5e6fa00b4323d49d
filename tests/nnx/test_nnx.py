"""Our Linen modules inside somebody's NNX model, through flax.nnx.bridge."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

import hybridnorm_jax as hn


def _shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree).items()}


def _error(ours, expected):
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


class Scorer(nnx.Module):
    """An NNX model around our Linen modules: Decoder, Norm, then a linear score per position."""

    def __init__(self, config, rngs):
        self.decoder = nnx.bridge.ToNNX(hn.Decoder(config), rngs=rngs)
        self.norm = nnx.bridge.ToNNX(hn.Norm(kind="layernorm", use_bias=True), rngs=rngs)
        self.score = nnx.Linear(config.vocab_size, 1, rngs=rngs)

    def __call__(self, tokens):
        return self.score(self.norm(self.decoder(tokens)))[..., 0]


def test_decoder_and_norm_inside_an_nnx_model_are_those_of_linen(small_config, random_params, tokens):
    config = small_config(scheme="hybrid_star", dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        params = {
            "decoder": random_params(config),
            "norm": {"scale": rng.standard_normal(61), "bias": rng.standard_normal(61)},
            "score": {"kernel": rng.standard_normal((61, 1)), "bias": rng.standard_normal(1)},
        }
        model = nnx.bridge.lazy_init(Scorer(config, nnx.Rngs(0)), tokens)
        state = nnx.state(model, nnx.Param)
        assert _shapes(nnx.to_pure_dict(state)) == _shapes(params)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(model, state)

        def linen(params):
            logits = hn.Decoder(config).apply({"params": params["decoder"]}, tokens)
            normed = hn.Norm(kind="layernorm", use_bias=True).apply({"params": params["norm"]}, logits)
            return (normed @ params["score"]["kernel"] + params["score"]["bias"])[..., 0]

        def loss(scores):
            return jnp.square(scores).mean()

        assert _error(model(tokens), linen(params)) < 1e-12
        ours = nnx.to_pure_dict(nnx.jit(nnx.grad(lambda model: loss(model(tokens))))(model))
        expected = jax.jit(jax.grad(lambda params: loss(linen(params))))(params)
        assert _shapes(ours) == _shapes(expected)
        for path, leaf in flatten_dict(expected).items():
            assert np.linalg.norm(leaf) > 0, path
            assert _error(flatten_dict(ours)[path], leaf) < 1e-10, path
