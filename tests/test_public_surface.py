"""What other code may rely on: names, signatures, shapes, and use inside a foreign Flax module."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn

TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def test_a_decoder_from_its_config():
    config = hn.ModelConfig(
        scheme="hybrid_star",
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=64,
        vocab_size=50,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=True,
        embedding_norm=True,
        dtype="bfloat16",
    )
    params = hn.Decoder(config).init(jax.random.key(0), TOKENS)["params"]
    logits = hn.Decoder(config).apply({"params": params}, TOKENS)
    assert logits.shape == (2, 5, 50)
    assert params["embedding_norm"]["scale"].shape == (32,)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert all(type(leaf) is dict or isinstance(leaf, jax.Array) for leaf in params.values())


def test_defaults_follow_from_the_sizes():
    config = hn.ModelConfig(d_model=96, num_heads=6, vocab_size=10)
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (6, 16, 256)
    assert hash(config) == hash(dataclasses.replace(config))


def test_every_name_is_there():
    for name in hn.__all__:
        assert getattr(hn, name) is not None
    assert {"layer_norm", "rms_norm", "crms_norm", "Norm", "SCHEMES", "params_from_olmo"} <= set(hn.__all__)


def test_single_modules_inside_somebody_elses_model():
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16)(x)
            x = x + hn.Attention(num_heads=2, num_kv_heads=1, head_dim=8, q_norm="head")(hn.Norm(kind="layernorm")(x))
            return x + hn.FeedForward(mlp_dim=24)(hn.Norm(use_bias=True, name="before_ffn")(x))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.float32)
    variables = Foreign().init(jax.random.key(0), x)
    assert Foreign().apply(variables, x).shape == (2, 6, 16)
    assert variables["params"]["before_ffn"]["bias"].shape == (16,)
    assert variables["params"]["Attention_0"]["out"]["kernel"].shape == (2, 8, 16)


def test_functions_under_jit_grad_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 8)), jnp.float32)
    for norm in (hn.layer_norm, hn.rms_norm, hn.crms_norm):
        np.testing.assert_allclose(jax.vmap(jax.jit(norm))(x), norm(x), rtol=1e-6)
        assert jnp.isfinite(jax.grad(lambda x, norm=norm: norm(x).sum())(x)).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scheme": "hybird"}, r"model\.scheme=hybird.*did you mean 'hybrid'"),
        ({"d_model": 100, "num_heads": 12}, r"model\.num_heads=12: must divide model\.d_model=100"),
        ({"num_heads": 12, "num_kv_heads": 5}, r"model\.num_kv_heads=5: must divide model\.num_heads=12"),
        ({"d_model": 30, "num_heads": 2}, r"model\.head_dim=15"),
        ({"activation": "swish"}, r"model\.activation=swish"),
        ({"positions": "learned"}, r"model\.max_positions=None: positions=learned needs a number"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0"),
        ({"num_layers": 0}, r"model\.num_layers=0: must be at least 1"),
        ({"dtype": "float16"}, r"model\.dtype=float16"),
        ({"embedding_norm": "maybe"}, r"model\.embedding_norm=maybe"),
    ],
    ids=str,
)
def test_impossible_models_say_which_key_and_what_would_be_right(keys, message):
    with pytest.raises(hn.ConfigError, match=message) as error:
        hn.ModelConfig(**keys)
    assert "\n" not in str(error.value)
