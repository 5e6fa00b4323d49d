"""What other code may rely on: names, signatures, shapes, and use inside a foreign Flax module."""

import dataclasses
import os
import subprocess
import sys
from importlib import metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal

import hybridnorm_jax as hn
from hybridnorm_jax.errors import UserError

POSITIONS = np.arange(5, dtype=np.int32)[None]
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
    params = jax.jit(hn.Decoder(config).init)(jax.random.key(0), TOKENS)["params"]
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
    assert hn.__version__ == metadata.version("hybridnorm-jax")
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
        ({"positions": "learned"}, r"model\.max_positions=null: positions=learned needs a number"),
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


# ---- Imports

# What a library that is imported into somebody's program must not bring along. flax.linen brings none of it.
HEAVY = ("grain", "jax.experimental.pallas", "optax", "orbax", "tensorboardX", "tensorstore", "tokenizers", "tqdm")


def _child(code, environment=None):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


@pytest.mark.parametrize(
    "use",
    ["", "hn.Decoder, hn.Norm, hn.MoE, hn.describe('span', 2)", "hn.ModelConfig(num_experts=2, experts_per_token=1)"],
)
def test_importing_brings_nothing_heavy(use):
    code = f"import sys, flax.linen, hybridnorm_jax as hn; {use or 'pass'}; print(*sys.modules)"
    assert not set(HEAVY) & set(_child(code))


def test_importing_and_first_uses_take_hardly_longer_than_importing_flax(tmp_path):
    """CPU seconds of one process, which other processes hardly lengthen: the ratio of one process of five.

    All read bytecode, as installed packages do. A checkout has none where PYTHONDONTWRITEBYTECODE is set, and half of
    the time would then be compilation of our sources beside Flax's bytecode: the first process writes it for the rest.
    A full garbage collection takes as long as the library's import, and falls into it or into Flax's by chance.
    """
    code = """
import gc, time
gc.disable()
import flax.linen
before = time.process_time()
import hybridnorm_jax as hn
hn.Norm, hn.Attention, hn.Block, hn.Decoder, hn.ModelConfig
print(time.process_time() / before)
"""
    environment = dict(os.environ, PYTHONPYCACHEPREFIX=str(tmp_path))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    _child(code, environment)
    assert any(float(_child(code, environment)[0]) < 1.10 for _ in range(5))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="Decodr"):
        hn.Decodr  # noqa: B018
    assert set(hn.__all__) <= set(dir(hn))


# ---- Modules from public names alone


def test_a_block_is_built_and_applied_from_public_names():
    config = hn.ModelConfig(d_model=32, num_heads=4, num_kv_heads=2, num_layers=4, vocab_size=50)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)
    block = hn.Block(config=config, placement=hn.SCHEMES["span"].block(0, 4))
    variables = block.init(jax.random.key(0), x)
    y = block.apply(variables, x)
    assert y.shape == x.shape
    positions = jnp.arange(6)[None]
    documents = jnp.asarray([[0, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(block.apply(variables, x, positions=positions), y)
    turn = hn.rotation(positions, config.rotary_width, config.rope_theta)
    np.testing.assert_array_equal(block.apply(variables, x, rotation=turn), y)
    # Rotation is relative, so that a shift of all positions changes nothing but rounding.
    np.testing.assert_allclose(block.apply(variables, x, positions=positions + 5), y, atol=1e-5)
    assert np.abs(block.apply(variables, x, positions=2 * positions) - y).max() > 1e-4
    apart = block.apply(variables, x, segment_ids=documents)
    np.testing.assert_allclose(apart[:, 3:], block.apply(variables, x[:, 3:]), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    diagonal(["float32", "bfloat16"], ["deepnorm", "layernorm_scaling", "hybrid_depth_scaled", "keel"], apart=2),
)
def test_a_block_honours_the_scales_of_its_placement(dtype, scheme, small_config, random_params, tokens):
    """Blocks one after the other are the decoder, whose scan takes the scales as inputs."""
    config = small_config(scheme=scheme, dtype=dtype)
    params = random_params(config)
    x = hn.Decoder(config).apply({"params": params}, tokens, mutable=["stream"], return_hidden=True)[1]["stream"]
    names = [name for name in sorted(params) if name.startswith("run_")]  # keel's first block is a run of its own
    outputs = [output for name in names for output in x[name]["value"][0]]
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for name in names for i in range(len(x[name]["value"][0]))
    ]
    stream = x["value"][0]
    for layer, (placement, own) in enumerate(zip(config.placements, layers, strict=True)):
        stream = hn.Block(config=config, placement=placement, layer=layer).apply({"params": own}, stream)
        assert stream.dtype == outputs[layer].dtype
        # The same operations one by one and in a compiled scan, which may keep a bfloat16 sum in float32: in each of
        # two sublayers a product, a norm, a scale and a sum may be rounded once more, by 2^-9 of the value at most.
        wide, expected = np.asarray(stream, np.float64), np.asarray(outputs[layer], np.float64)
        unit = 8 * 2**-9 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(wide, expected, rtol=0, atol=unit * np.abs(expected).max())
        stream = outputs[layer]
    if scheme == "deepnorm":  # and without its scales a block is another one
        plain = dataclasses.replace(config, scheme="post").placements[0]
        other = hn.Block(config=config, placement=plain).apply({"params": own}, x["value"][0])
        assert np.abs(np.asarray(other - outputs[0], np.float32)).max() > 0.05


def test_attention_rotates_by_rope_theta_and_positions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    plain, rotated = hn.Attention(num_heads=4), hn.Attention(num_heads=4, rope_theta=1e4)
    variables = plain.init(jax.random.key(0), x)
    assert variables["params"]["key"]["kernel"].shape == (32, 4, 8)  # num_kv_heads and head_dim follow
    jax.tree.map(np.testing.assert_array_equal, rotated.init(jax.random.key(0), x), variables)
    y = rotated.apply(variables, x)
    assert np.abs(y - plain.apply(variables, x)).max() > 1e-5
    positions = jnp.arange(5)[None]
    np.testing.assert_array_equal(rotated.apply(variables, x, positions=positions), y)
    turn = hn.rotation(positions, 8, 1e4)
    np.testing.assert_array_equal(plain.apply(variables, x, rotation=turn), y)
    half = hn.Attention(num_heads=4, rope_theta=1e4, rotary_dim=4)
    np.testing.assert_array_equal(
        half.apply(variables, x), plain.apply(variables, x, rotation=hn.rotation(positions, 4, 1e4))
    )


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (
            hn.Attention(num_heads=4),
            {"positions": POSITIONS},
            r"^positions: nothing here reads them, because nothing rotates \(rope_theta=None\)",
        ),
        (
            hn.Attention(num_heads=4, rope_theta=1e4),
            {"positions": POSITIONS, "rotation": (np.ones((1, 5, 1, 4)), np.zeros((1, 5, 1, 4)))},
            "^positions: they are in the rotation already",
        ),
        (hn.Attention(num_heads=4, num_kv_heads=3), {}, "^num_kv_heads=3: must divide num_heads=4"),
        (hn.Attention(num_heads=5), {}, "^num_heads=5: must divide the width of x, 32, or set head_dim"),
        (
            hn.Attention(num_heads=4, rope_theta=1e4, rotary_dim=3),
            {},
            "^rotary_dim=3: must be even, and at most",
        ),
        (hn.Attention(num_heads=4, rotary_dim=4), {}, "^rotary_dim=4: nothing rotates without rope_theta"),
        (hn.Attention(num_heads=4, num_kv_heads=0), {}, "^num_kv_heads=0: must be at least 1"),
        (hn.Attention(num_heads=4, backend="fast"), {}, "^backend='fast': must be auto, xla, cudnn, flash, splash"),
        (hn.Attention(num_heads=4), {"segment_ids": POSITIONS[0]}, r"^segment_ids: shape \(5,\) must be \(1, 5\)"),
        (
            hn.Attention(num_heads=4, rope_theta=1e4),
            {"positions": POSITIONS[:, :4]},
            r"^positions: shape \(1, 4\) must be \(1, 5\)",
        ),
    ],
    ids=[
        *("positions", "both", "kv_heads", "heads", "rotary_dim", "rotary_dim_alone", "no_kv_heads", "backend"),
        *("flat_segment_ids", "short_positions"),
    ],
)
def test_impossible_attention_names_its_argument(module, inputs, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.ones((1, 5, 32)), **inputs)


def test_a_decoder_returns_what_its_head_reads(small_config, random_params, tokens):
    config = small_config(scheme="pre")
    variables, model = {"params": random_params(config)}, hn.Decoder(config)
    hidden = model.apply(variables, tokens, return_hidden=True)
    assert hidden.shape == (2, 12, 32)
    np.testing.assert_array_equal(hidden, model.apply(variables, tokens, method="hidden"))
    logits = model.apply(variables, hidden, method="logits")
    np.testing.assert_array_equal(model.apply(variables, tokens), logits)
    assert "head" not in model.init(jax.random.key(0), tokens, return_hidden=True)["params"]


# ---- Schemes as text


def test_schemes_and_their_tables():
    assert hn.schemes()[:2] == ("pre", "post")
    assert set(hn.schemes()) == set(hn.SCHEMES)
    assert hn.describe("span", 4) == hn.SCHEMES["span"].table(4)
    with pytest.raises(UserError, match=r"^spam: no such scheme; did you mean 'span'\?$"):
        hn.describe("spam", 4)
    with pytest.raises(UserError, match=r"^0: a model has at least one block$"):
        hn.describe("span", 0)
