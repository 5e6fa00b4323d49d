"""Keys of attention in modules and models: what each computes, against NumPy, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal

import hybridnorm_jax as hn
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.device_mesh import make_mesh, use_mesh
from hybridnorm_jax.training.program import Program

TINY = {"d_model": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 61}
WIDE = {"dtype": "float64", "param_dtype": "float64"}
RULES = {
    "attention_scale": 0.9,
    "score_cap": 3.0,
    "attention_sinks": True,
    "qkv_clip": 0.8,
    "attention_bias": True,
    "attention_output_bias": False,
}
LONG = {"rope_long_factors": (2, 3, 4, 5), "rope_factor": 4}


def drawn(module, *inputs, seed=0, **keys):
    """Parameters at random, so that none is at its first value, such as a bias of zero."""
    shapes = jax.eval_shape(functools.partial(module.init, **keys), jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.6 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def attention_in_numpy(params, x, *, scale, cap, clip, window, causal, eps=1e-5):
    """One attention layer with LayerNorm of each head with its own scale and bias, written out."""

    def heads(name):
        kernel, bias = np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])
        return np.clip(np.einsum("bse,ehd->bshd", x, kernel) + bias, -clip, clip)

    def normalized(name, y):
        y = y - y.mean(-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)
        return y * np.asarray(params[name]["scale"]) + np.asarray(params[name]["bias"])

    query, key, value = normalized("q_norm", heads("query")), normalized("k_norm", heads("key")), heads("value")
    context, (_, seq, num_heads, _) = np.zeros_like(query), query.shape
    for row, place, head in np.ndindex(x.shape[0], seq, num_heads):
        first, end = max(place - window + 1, 0), place + 1 if causal else min(place + window, seq)
        keys, values = (array[row, first:end, head // 2] for array in (key, value))
        scores = cap * np.tanh(scale * keys @ query[row, place, head] / cap)
        weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(np.asarray(params["sinks"])[head]))
        context[row, place, head] = weights @ values
    return np.einsum("bshd,hde->bse", context, np.asarray(params["out"]["kernel"]))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_what_its_attributes_say(causal):
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((2, 9, 32))
        attention = hn.Attention(
            **{"num_heads": 4, "num_kv_heads": 2, "q_norm": "head", "k_norm": "head", "norm": "layernorm"},
            **{"norm_bias": True, "norm_per_head": True, "score_scale": 0.9, "score_cap": 3.0, "qkv_clip": 0.8},
            **{"window": 4, "causal": causal, "use_sinks": True, "use_bias": True, "use_output_bias": False},
            **{"dtype": jnp.float64, "param_dtype": jnp.float64},
        )
        params = drawn(attention, jnp.asarray(x))
        assert params["q_norm"]["scale"].shape == (4, 8)
        assert params["k_norm"]["bias"].shape == (2, 8)
        assert "bias" not in params["out"]
        y = attention.apply({"params": params}, x)
        at_run_time = dataclasses.replace(attention, window=None).apply(
            {"params": params}, x, layer_window=jnp.asarray(4)
        )
    expected = attention_in_numpy(params, x, scale=0.9, cap=3.0, clip=0.8, window=4, causal=causal)
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(at_run_time, expected, rtol=1e-11, atol=1e-12)


def by_hand(config, params, tokens):
    """A decoder block by block, each with the parameters of its layer; only the first and the last part are its own."""
    model = hn.Decoder(config)
    stream = jnp.take(params["token_embedding"]["embedding"], tokens, axis=0)
    for number, run in enumerate(config.runs):
        for place in range(run.length):
            layer = run.start + place
            block = hn.Block(config=config, placement=config.placements[layer], layer=layer)
            own = jax.tree.map(lambda leaf, place=place: leaf[place], params[f"run_{number}"])
            stream = block.apply({"params": own}, stream)
    stream = hn.Norm(epsilon=config.norm_eps).apply({"params": params["final_norm"]}, stream)
    return model.apply({"params": params}, stream, method="logits")


@pytest.mark.parametrize("windows", [(), (3, 0), (3, 3, 0), (0, 2, 5), (2,)])
def test_each_layer_of_a_model_has_its_window(windows):
    """Runs of one window know it when they are compiled; where windows differ, the loop over layers carries them."""
    with jax.enable_x64(True):
        config = hn.ModelConfig(**TINY, **WIDE, **RULES, scheme="pre", windows=windows)
        tokens = np.random.default_rng(0).integers(0, 61, (2, 12))
        params = drawn(hn.Decoder(config), jnp.asarray(tokens))
        logits = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
        np.testing.assert_allclose(logits, by_hand(config, params, tokens), rtol=1e-10, atol=1e-12)
        # A token is seen no farther than windows reach, one behind the other.
        reach = sum((window or 12) - 1 for window in config.layer_windows)
        changed = tokens.copy()
        changed[:, 0] = (changed[:, 0] + 1) % 61
        moved = np.abs(jax.jit(hn.Decoder(config).apply)({"params": params}, changed) - logits).max((0, 2))
        assert (moved[: reach + 1] > 0).all()
        assert (moved[reach + 1 :] == 0).all()


@pytest.mark.parametrize(
    "keys",
    [
        {"windows": (5, 0)},
        {"rope_layers": (1, 0, 2), "second_rope_theta": 100.0},
        {"positions": "alibi", "alibi_scale": 0.5},
        {"positions": "alibi", "alibi_bfloat16": True, "windows": (5, 0)},
        {"positions": "sinusoidal", "max_positions": 20, "position_offset": 2},
        {"rope_scaling": "longrope", "rope_original_length": 7, "rope_short_factors": (1,) * 4, **LONG},
        {"rope_scaling": "longrope", "rope_original_length": 6, "rope_short_factors": (1,) * 4, **LONG},
    ],
    ids=str,
)
def test_documents_in_one_row_are_as_if_alone(keys):
    with jax.enable_x64(True):
        config = hn.ModelConfig(**TINY, **WIDE, **RULES, scheme="hybrid", **keys)
        tokens = np.random.default_rng(0).integers(0, 61, (1, 14))
        params = drawn(hn.Decoder(config), jnp.asarray(tokens))
        apply = jax.jit(hn.Decoder(config).apply)
        ids, positions = np.repeat([[1, 2]], 7, axis=1), np.tile(np.arange(7), 2)[None]
        packed = apply({"params": params}, tokens, segment_ids=ids, positions=positions)
        alone = apply({"params": params}, tokens.reshape(2, 7))
    np.testing.assert_allclose(packed.reshape(2, 7, -1), alone, rtol=1e-10, atol=1e-12)


MESHES = [{"context": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
TRAINED = [
    {"rope_layers": (1, 0, 2), "second_rope_theta": 100.0, "rope_scaling": "linear", "rope_factor": 2},
    {"positions": "alibi"},
    {"positions": "alibi", "alibi_bfloat16": True},
]


@pytest.mark.parametrize(("keys", "sizes"), diagonal(TRAINED, MESHES, apart=3))
def test_gradients_of_a_model_are_those_of_one_device_on_a_mesh(sizes, keys):
    with jax.enable_x64(True):
        config = hn.ModelConfig(**TINY, **WIDE, **RULES, **keys, scheme="pre", windows=(5, 0), remat="full")
        tokens = np.random.default_rng(0).integers(0, 61, (4, 16))
        params = drawn(hn.Decoder(config), jnp.asarray(tokens))

        def loss(params):
            return jnp.square(hn.Decoder(config).apply({"params": params}, tokens)).mean()

        expected = jax.jit(jax.grad(loss))(params)
        assert np.abs(expected["run_0"]["attention"]["sinks"]).min() > 0
        mesh = make_mesh(sizes)
        with use_mesh(mesh):
            placed = jax.device_put(params, hn.tree_shardings(params, mesh))
            got = jax.jit(jax.grad(loss))(placed)
    for right, array in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(array, right, rtol=0, atol=1e-11 * np.abs(right).max())


def test_nnx_takes_the_same_attributes():
    from flax import nnx

    attributes = {"num_heads": 4, "window": 3, "use_sinks": True, "score_cap": 2.0, "causal": False}
    module = hn.nnx.Attention(32, rngs=nnx.Rngs(0), **attributes)
    module.sinks[...] = jnp.arange(4.0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 32)), jnp.float32)
    linen = hn.Attention(**attributes)
    params = hn.nnx.to_linen_params(module)
    np.testing.assert_array_equal(module(x), linen.apply({"params": params}, x))


def test_training_refuses_a_kernel_without_what_the_model_has(small_config):
    config = hn.RunConfig(model=small_config(attention="flash", attention_sinks=True))
    with pytest.raises(ConfigError, match=r"model\.attention=flash"):
        Program(config)


def test_windows_as_wide_as_the_sequences_keep_no_kernel_away(small_config):
    model = small_config(attention="flash", windows=(16, 40), attention_sinks=False)
    assert model.score_features(16) == ()
    assert model.score_features(17) == ("windows",)
    tokens = jnp.zeros((1, 16), jnp.int32)
    plain = dataclasses.replace(model, windows=(), attention="xla")
    wide = dataclasses.replace(model, attention="xla")
    traced = [str(jax.make_jaxpr(lambda c=c: hn.Decoder(c).init(jax.random.key(0), tokens))()) for c in (plain, wide)]
    assert traced[0] == traced[1]


def test_a_norm_for_each_head_needs_a_norm_over_heads():
    assert hn.ModelConfig(**TINY, scheme="hybrid", attention_norm_per_head=True)
    for scheme in ("pre", "pre_qk_projection"):
        with pytest.raises(ConfigError, match=r"attention_norm_per_head=true.*over a head"):
            hn.ModelConfig(**TINY, scheme=scheme, attention_norm_per_head=True)
