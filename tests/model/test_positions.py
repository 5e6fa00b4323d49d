"""How models know positions: rotations stretched and chosen by layer, a fixed table, ALiBi. In float64."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_attention_keys import TINY, WIDE, drawn

import hybridnorm_jax as hn
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.alibi import AlibiKind, alibi_slopes
from hybridnorm_jax.model.rotation import rotations, stretched
from hybridnorm_jax.model.sinusoids import sinusoids

HEAD = {"d_model": 64, "num_heads": 2, "num_layers": 1, "vocab_size": 61, "rope_theta": 10_000.0}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8, "rope_original_length": 256, "rope_bounds": (1, 4)}
YARN = {"rope_scaling": "yarn", "rope_factor": 16, "rope_original_length": 512, "rope_bounds": (1, 32)}
LONGROPE = {
    **{"rope_scaling": "longrope", "rope_factor": 4, "rope_original_length": 8},
    **{"rope_short_factors": tuple(1 + i / 8 for i in range(16)), "rope_long_factors": tuple(2 + i for i in range(16))},
}
SCALINGS = {
    "linear": {"rope_scaling": "linear", "rope_factor": 4},
    "llama3": LLAMA3,
    "llama3, other bounds": LLAMA3 | {"rope_bounds": (0.5, 9.0), "rope_original_length": 100, "rope_factor": 3},
    "yarn": YARN,
    "yarn, not rounded": YARN | {"rope_truncate": False, "rope_theta": 150_000.0, "rotary_dim": 24},
    "yarn, all pairs between": YARN | {"rope_original_length": 16, "rope_factor": 1.5},
    "yarn, one bound": YARN | {"rope_original_length": 6, "rope_factor": 2},
    "yarn, factor given": YARN | {"rope_attention_factor": 0.8},
    "longrope": LONGROPE,
    "longrope, factor given": LONGROPE | {"rope_attention_factor": 1.25},
}


def model(**keys):
    return hn.ModelConfig(**HEAD | keys)


def as_transformers(config):
    """What transformers computes for this configuration: (inverse wavelengths, factor, those of a long text)."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    low, high = config.rope_bounds or (None, None)
    parameters = {
        "rope_type": config.rope_scaling,
        "rope_theta": config.rope_theta,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_original_length,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "beta_slow": low,
        "beta_fast": high,
        "truncate": config.rope_truncate,
        "attention_factor": config.rope_attention_factor,
        "short_factor": list(config.rope_short_factors),
        "long_factor": list(config.rope_long_factors),
        "partial_rotary_factor": config.rotary_width / config.head_dim,
    }
    theirs = LlamaConfig(
        hidden_size=config.d_model,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=2**14,
    )
    theirs.rope_parameters = parameters
    compute = ROPE_INIT_FUNCTIONS[config.rope_scaling]
    short, factor = compute(theirs, "cpu", seq_len=1)
    long, _ = compute(theirs, "cpu", seq_len=2**14)
    return short.numpy(), factor, long.numpy()


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_wavelengths_are_those_of_transformers(name):
    config = model(**SCALINGS[name])
    inverse, factor, inverse_long = as_transformers(config)
    ours = stretched(config)
    np.testing.assert_allclose(1 / ours.wavelengths, inverse, rtol=3e-6)  # theirs are float32, of several roundings
    np.testing.assert_allclose(1 / (ours.wavelengths if ours.long is None else ours.long), inverse_long, rtol=3e-6)
    np.testing.assert_allclose(ours.factor, factor, rtol=1e-12)
    assert np.abs(ours.wavelengths / config.rope_theta ** (np.arange(0, 32, 2)[: len(inverse)] / 32) - 1).max() > 0.01


def test_llama3_and_yarn_by_hand():
    """One wave on each side of the bounds and one between them, from the papers' formulas."""
    config = model(**LLAMA3)
    plain = 10_000.0 ** (np.arange(0, 32, 2) / 32)
    ours = stretched(config).wavelengths
    turns = 256 / (2 * math.pi * plain)
    for pair in range(16):
        blend = min(max((turns[pair] - 1) / 3, 0), 1)
        assert math.isclose(1 / ours[pair], (1 - blend) / 8 / plain[pair] + blend / plain[pair], rel_tol=1e-12)
    assert {0.0, 1.0} < set(np.clip((turns - 1) / 3, 0, 1))
    # YaRN: c(32) = 32 ln(512 / (64 pi)) / (2 ln 10000) = 1.62 and c(1) = 7.64, rounded to 1 and 8.
    factors = stretched(model(**YARN)).wavelengths / plain
    np.testing.assert_allclose(factors[[0, 1]], 1)
    np.testing.assert_allclose(factors[[8, 9, 15]], 16)
    np.testing.assert_allclose(factors[3], 1 / (5 / 7 + 2 / 7 / 16))


@pytest.mark.parametrize("name", SCALINGS)
def test_the_rotation_is_cos_and_sin_of_positions_over_wavelengths(name):
    config, positions = model(**SCALINGS[name]), np.array([[3, 0, 5], [9, 700, 2]])
    rule = stretched(config)
    with jax.enable_x64(True):
        ((kind, (cos, sin)),) = rotations(config, jnp.asarray(positions), "float64").items()
        narrow = rotations(config, jnp.asarray(positions), "bfloat16")[1][0]
    assert kind == 1
    assert narrow.dtype == jnp.float32
    long = rule.wavelengths if rule.long is None else rule.long
    for row, wavelengths in enumerate((rule.wavelengths, long)):  # the second row goes beyond every length
        angles = positions[row][:, None] / wavelengths
        np.testing.assert_allclose(cos[row, :, 0], rule.factor * np.cos(angles), rtol=0, atol=1e-12)
        np.testing.assert_allclose(sin[row, :, 0], rule.factor * np.sin(angles), rtol=0, atol=1e-12)


def test_longrope_takes_the_long_factors_from_one_token_beyond_its_length_on():
    config, rule = model(**LONGROPE), stretched(model(**LONGROPE))
    for length, wavelengths in ((8, rule.wavelengths), (9, rule.long)):
        with jax.enable_x64(True):
            cos, _ = rotations(config, jnp.arange(length)[None], "float64")[1]
        np.testing.assert_allclose(cos[0, 1, 0], rule.factor * np.cos(1 / wavelengths), rtol=1e-12)


def through_blocks(config, params, tokens, turns):
    """A decoder block by block, each given its rotation: turns[layer], or None."""
    whole = hn.Decoder(config)
    stream = jnp.take(params["token_embedding"]["embedding"], tokens, axis=0)
    for number, run in enumerate(config.runs):
        for place in range(run.length):
            layer = run.start + place
            own = jax.tree.map(lambda leaf, place=place: leaf[place], params[f"run_{number}"])["attention"]
            attention = hn.Attention(num_heads=4, num_kv_heads=2, dtype=jnp.float64, param_dtype=jnp.float64)
            block = jax.tree.map(lambda leaf, place=place: leaf[place], params[f"run_{number}"])
            norms = [block[f"{name}_pre_norm"]["scale"] for name in ("attention", "feed_forward")]
            y = hn.rms_norm(stream, norms[0])
            stream = stream + attention.apply({"params": own}, y, rotation=turns[layer])
            feed_forward = hn.FeedForward(mlp_dim=config.mlp_dim, dtype=jnp.float64, param_dtype=jnp.float64)
            stream = stream + feed_forward.apply({"params": block["feed_forward"]}, hn.rms_norm(stream, norms[1]))
    stream = hn.rms_norm(stream, params["final_norm"]["scale"])
    return whole.apply({"params": params}, stream, method="logits")


@pytest.mark.parametrize("layers", [(), (1, 0), (0,), (2,), (0, 2), (1, 2), (1, 1, 0), (2, 0, 1)])
def test_each_layer_of_a_model_has_its_rotation(layers):
    second = {"second_rope_theta": 70.0} if 2 in layers else {}
    with jax.enable_x64(True):
        config = hn.ModelConfig(**TINY, **WIDE, **second, scheme="pre", rope_theta=300.0, rope_layers=layers)
        positions = np.array([[0, 1, 2, 3, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8, 9, 30]])
        tokens = np.random.default_rng(0).integers(0, 61, positions.shape)
        params = drawn(hn.Decoder(config), jnp.asarray(tokens))
        kinds = {
            0: None,
            1: hn.rotation(positions, 8, 300.0, jnp.float64),
            2: hn.rotation(positions, 8, 70.0, "float64"),
        }
        turns = [kinds[(layers or (1,))[layer % len(layers or (1,))]] for layer in range(3)]
        expected = through_blocks(config, params, tokens, turns)
        for remat in ("none", "full"):
            config = hn.ModelConfig(
                **TINY, **WIDE, **second, scheme="pre", rope_theta=300.0, rope_layers=layers, remat=remat
            )
            logits = jax.jit(functools.partial(hn.Decoder(config).apply, positions=positions))(
                {"params": params}, tokens
            )
            np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-12)


def test_a_block_alone_has_the_window_and_the_rotation_of_its_layer():
    with jax.enable_x64(True):
        config = hn.ModelConfig(
            **TINY, **WIDE, scheme="pre", rope_layers=(1, 0, 2), second_rope_theta=70.0, windows=(0, 3, 0)
        )
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 32)))
        blocks = [hn.Block(config=config, placement=config.placements[0], layer=layer) for layer in range(3)]
        params = drawn(blocks[0], x)
        shifted = jnp.arange(6)[None] * 5

        def moves(block, **keys):
            return np.abs(block.apply({"params": params}, x, **keys) - block.apply({"params": params}, x)).max() > 1e-6

        assert [moves(block, positions=shifted) for block in blocks] == [True, False, True]
        turn = hn.rotation(jnp.arange(6)[None], 8, 70.0, jnp.float64)
        assert [moves(block, rotation=turn) for block in blocks] == [True, True, False]
        with pytest.raises(ValueError, match=r"^positions: they are in the rotation already"):
            blocks[0].apply({"params": params}, x, rotation=turn, positions=shifted)


# ---- Positions that are added.


def test_sinusoids_are_the_table_of_xglm():
    positions = np.array([[0, 1, 5], [2, 100, 2049]])
    with jax.enable_x64(True):
        for width in (8, 9):
            table = sinusoids(jnp.asarray(positions), width, "float64")
            for row, column, channel in np.ndindex(2, 3, 4):
                angle = positions[row, column] * 10_000 ** (-channel / 3)
                assert math.isclose(table[row, column, channel], math.sin(angle), abs_tol=1e-11)
                assert math.isclose(table[row, column, 4 + channel], math.cos(angle), abs_tol=1e-11)
            assert (np.asarray(table[..., 8:]) == 0).all()


def test_sinusoids_are_close_to_those_of_transformers_in_float32():
    torch = pytest.importorskip("torch")
    from transformers.models.xglm.modeling_xglm import XGLMSinusoidalPositionalEmbedding

    theirs = XGLMSinusoidalPositionalEmbedding(64, 32, padding_idx=1)(torch.arange(60)[None]).numpy()
    np.testing.assert_allclose(sinusoids(2 + jnp.arange(60)[None], 32, "float32"), theirs, atol=5e-6)


def test_a_fixed_table_is_no_parameter_and_starts_at_its_offset():
    config = hn.ModelConfig(**TINY, scheme="pre", positions="sinusoidal", max_positions=9, position_offset=2)
    tokens = jnp.zeros((1, 9), jnp.int32)
    decoder = hn.Decoder(config)
    params = drawn(decoder, tokens)
    assert set(params) == {"token_embedding", "run_0", "final_norm", "head"}
    shifted = hn.ModelConfig(**TINY, scheme="pre", positions="sinusoidal", max_positions=9)
    np.testing.assert_array_equal(
        decoder.apply({"params": params}, tokens),
        hn.Decoder(shifted).apply({"params": params}, tokens, positions=2 + jnp.arange(9)[None]),
    )
    with pytest.raises(ValueError, match=r"10 tokens, but model\.max_positions=9"):
        decoder.apply({"params": params}, jnp.zeros((1, 10), jnp.int32))


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(1, [8]), (2, [4, 8]), (3, [4, 8, 2]), (6, [2, 4, 6, 8, 1, 3]), (8, range(1, 9))],
)
def test_slopes_of_any_number_of_heads(heads, expected):
    np.testing.assert_allclose(alibi_slopes(heads), 2.0 ** -np.array(expected), rtol=1e-15)
    np.testing.assert_allclose(alibi_slopes(heads, 4.0), 2.0 ** (-np.array(expected) / 2), rtol=1e-15)


def test_slopes_are_those_of_three_models_of_transformers():
    """Of Falcon bit for bit, since it rounds them to bfloat16."""
    torch = pytest.importorskip("torch")
    from transformers.models.bloom import modeling_bloom as bloom
    from transformers.models.falcon import modeling_falcon as falcon
    from transformers.models.mpt import modeling_mpt as mpt

    mask = torch.ones(1, 2, dtype=torch.long)
    for heads in (*range(1, 41), 71, 96, 128):
        ours = alibi_slopes(heads).astype(np.float32)
        rounded = falcon.build_alibi_tensor(mask, heads, torch.float32).reshape(heads, 2)[:, 1].numpy()
        np.testing.assert_array_equal(ours.astype(ml_dtypes.bfloat16).astype(np.float32), rounded)
        theirs = bloom.build_alibi_tensor(mask, heads, torch.float32).reshape(heads, 2)[:, 1].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=3e-6)
        theirs = mpt.build_mpt_alibi_tensor(heads, 2, alibi_bias_max=6).reshape(heads, 2)[:, 0].numpy()
        np.testing.assert_allclose(alibi_slopes(heads, 6.0), -theirs, rtol=3e-6)


def test_falcon_rounds_products_of_positions():
    """Position 301 is 302 in bfloat16."""
    torch = pytest.importorskip("torch")
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 700, dtype=torch.long), 3, torch.float32).reshape(3, 700).numpy()
    positions = jnp.arange(700)[None]
    for apply in (lambda f: f, jax.jit):
        rule = AlibiKind(in_bfloat16=True).rule(3, "float32", positions)
        added = apply(lambda rule: rule.added((-1, 1), query=0, key=0, key_position=rule.key_positions))(rule)
        np.testing.assert_array_equal(added, theirs)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (LONGROPE | {"rope_original_length": 1}, r"rope_original_length=1: .*above 1"),
        (YARN | {"rope_theta": 1.0}, r"rope_theta=1\.0: .*above 1"),
        ({"positions": "sinusoidal"}, "max_positions"),
        ({"positions": "sinusoidal", "max_positions": 4, "d_model": 2, "num_heads": 1}, "d_model=2: .*4 channels"),
    ],
)
def test_positions_that_cannot_be_are_refused(keys, says):
    with pytest.raises(ConfigError, match=says):
        model(**keys)
