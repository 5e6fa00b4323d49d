"""Schemes with a side stream, as their authors' PyTorch code computes them, and what a side stream must not change."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn

GOLDENS = Path(__file__).parents[1] / "goldens" / "placements"
WIDTH = 32


def _golden(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


class Theirs:
    """Their parameters, or gradients, in the form of ours."""

    def __init__(self, golden, prefix, layers):
        self.golden, self.prefix, self.layers = golden, prefix, layers

    def one(self, name):
        return self.golden[f"{self.prefix}{name}"]

    def stacked(self, name, rows=slice(None)):
        return np.stack([self.one(name.format(layer))[rows] for layer in range(self.layers)])

    def dense(self, name, inputs, outputs, *, rows=slice(None), bias=False):
        kernel = np.moveaxis(self.stacked(f"{name}.weight", rows), 1, 2)
        found = {"kernel": kernel.reshape(self.layers, *inputs, *outputs)}
        if bias:
            found["bias"] = self.stacked(f"{name}.bias", rows).reshape(self.layers, *outputs)
        return found

    def norm(self, name, *, bias=False):
        found = {"scale": self.stacked(f"{name}.weight")}
        return found | ({"bias": self.stacked(f"{name}.bias")} if bias else {})

    def outer_norm(self, name, *, bias=False):
        found = {"scale": self.one(f"{name}.weight")}
        return found | ({"bias": self.one(f"{name}.bias")} if bias else {})


# ---- SiameseNorm's language model: OLMo's, with heads/2 heads of keys and values.


def _siamese_params(golden, prefix, scheme):
    theirs, block = Theirs(golden, prefix, 3), "transformer.blocks.{}."
    per_head, per_kv_head = (4, 8), (2, 8)
    attention = {
        name: theirs.dense(f"{block}att_proj", (WIDTH,), heads, rows=slice(*rows))
        for name, heads, rows in (
            ("query", per_head, (0, 32)),
            ("key", per_kv_head, (32, 48)),
            ("value", per_kv_head, (48, 64)),
        )
    }
    attention["out"] = theirs.dense(f"{block}attn_out", per_head, (WIDTH,))
    for name in ("q_norm", "k_norm", "v_norm"):
        attention[name] = theirs.norm(f"{block}{name}")
    feed_forward = {
        "up": theirs.dense(f"{block}ff_proj", (WIDTH,), (48,), rows=slice(0, 48)),
        "gate": theirs.dense(f"{block}ff_proj", (WIDTH,), (48,), rows=slice(48, 96)),
        "down": theirs.dense(f"{block}ff_out", (48,), (WIDTH,)),
    }
    run = {
        "attention": attention,
        "attention_post_norm": theirs.norm(f"{block}ff_norm"),
        "attention_side_norm": theirs.norm(f"{block}attn_y_norm"),
        "feed_forward": feed_forward,
        "feed_forward_pre_norm": theirs.norm(f"{block}ff_input_norm"),
        "feed_forward_side_norm": theirs.norm(f"{block}ff_y_norm"),
    }
    if scheme == "siamese_hybrid_pre":
        run["attention_own_vector"] = {"scale": theirs.stacked(f"{block}c1")}
    else:
        run["attention_own_norm"] = theirs.norm(f"{block}attn_norm")
    return {
        "token_embedding": {"embedding": theirs.one("transformer.wte.weight")},
        "head": {"kernel": theirs.one("transformer.ff_out.weight").T},
        "streams": {
            "main_norm": theirs.outer_norm("transformer.ln_f"),
            "side_norm": theirs.outer_norm("transformer.ln_y_f"),
        },
        "final_norm": theirs.outer_norm("transformer.ln_final_f"),
        "run_0": run,
    }


def _siamese_config(scheme, **changes):
    sizes = {"d_model": WIDTH, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 61}
    return hn.ModelConfig(scheme=scheme, **sizes, rope_theta=500000.0, **changes)


# ---- SiameseNorm's vision transformer, between the embedding and the head.


def _deit_params(golden, prefix):
    theirs, block = Theirs(golden, prefix, 3), "blocks.{}."
    per_head = (4, 8)
    attention = {
        name: theirs.dense(f"{block}attn.qkv", (WIDTH,), per_head, rows=slice(32 * i, 32 * (i + 1)), bias=True)
        for i, name in enumerate(("query", "key", "value"))
    }
    attention["out"] = theirs.dense(f"{block}attn.proj", per_head, (WIDTH,), bias=True)
    run = {
        "attention": attention,
        "feed_forward": {
            "up": theirs.dense(f"{block}mlp.fc1", (WIDTH,), (64,), bias=True),
            "down": theirs.dense(f"{block}mlp.fc2", (64,), (WIDTH,), bias=True),
        },
    }
    for number, sublayer in enumerate(("attention", "feed_forward"), start=1):
        for part, name in (("entry", "post_norm"), ("side", "pre_norm"), ("pre", "input_norm")):
            run[f"{sublayer}_{part}_norm"] = theirs.norm(f"{block}{name}{number}", bias=True)
    return {
        # The names at the end are crossed: pre_norm is applied to the residual stream, post_norm to the other.
        "streams": {
            "main_norm": theirs.outer_norm("pre_norm", bias=True),
            "side_norm": theirs.outer_norm("post_norm", bias=True),
        },
        "final_norm": theirs.outer_norm("final_norm", bias=True),
        "run_0": run,
    }


# ---- ResiDual: fairseq's decoder.


def _residual_params(golden, prefix):
    theirs, block = Theirs(golden, prefix, 3), "layers.{}."
    per_head, scale = (4, 8), float(golden["meta/embed_scale"])
    projections = {
        name: theirs.dense(f"{block}self_attn.{name[0]}_proj", (WIDTH,), per_head, bias=True)
        for name in ("query", "key", "value")
    }
    return {
        "token_embedding": {
            "embedding": theirs.one("embed_tokens.weight") * (scale if prefix == "param/" else 1 / scale)
        },
        "position_embedding": {"embedding": theirs.one("embed_positions.weight")},
        "head": {"kernel": theirs.one("output_projection.weight").T},
        "streams": {"side_norm": theirs.outer_norm("layer_norm", bias=True)},
        "run_0": {
            "attention": projections
            | {"out": theirs.dense(f"{block}self_attn.out_proj", per_head, (WIDTH,), bias=True)},
            "attention_post_norm": theirs.norm(f"{block}self_attn_layer_norm", bias=True),
            "feed_forward": {
                "up": theirs.dense(f"{block}fc1", (WIDTH,), (48,), bias=True),
                "down": theirs.dense(f"{block}fc2", (48,), (WIDTH,), bias=True),
            },
            "feed_forward_post_norm": theirs.norm(f"{block}final_layer_norm", bias=True),
        },
    }


def _residual_config(scheme):
    return hn.ModelConfig(
        scheme=scheme,
        d_model=WIDTH,
        num_layers=3,
        num_heads=4,
        mlp_dim=48,
        vocab_size=61,
        norm="layernorm",
        norm_bias=True,
        activation="relu",
        attention_bias=True,
        mlp_bias=True,
        positions="learned",
        position_offset=2,
        max_positions=64,
    )


def _check(apply, params, golden, expected, *, tolerance=1e-5):
    """Output, loss and gradients are those of the golden; a bias of keys has none but rounding."""

    def loss_fn(params):
        output = apply(params)
        if "x" in golden:
            return jnp.square(output).mean(), output
        log_probs = jax.nn.log_softmax(output[:, :-1])
        return -jnp.take_along_axis(log_probs, jnp.asarray(golden["tokens"])[:, 1:, None], -1).mean(), output

    (loss, output), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(output, golden["output" if "x" in golden else "logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if "'key'" in name and "'bias'" in name:
            assert np.abs(ours).max() < 1e-7
            continue
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("scheme", ["siamese_hybrid_pre", "siamese_attn_norm"])
def test_siamese_norms_language_model_is_reproduced(scheme):
    golden, config = _golden(scheme), _siamese_config(scheme)
    tokens, params = jnp.asarray(golden["tokens"]), _siamese_params(golden, "param/", scheme)
    fresh = jax.eval_shape(lambda: hn.Decoder(config).init(jax.random.key(0), tokens))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    _check(
        lambda params: hn.Decoder(config).apply({"params": params}, tokens),
        params,
        golden,
        _siamese_params(golden, "grad/", scheme),
    )


@pytest.mark.parametrize("name", ["siamese_post_pre_deit", "siamese_post_pre_deit_causal"])
def test_siamese_norms_vision_transformer_is_reproduced(name):
    golden = _golden(name)
    config = hn.EncoderConfig(
        scheme="siamese_post_pre",
        d_model=WIDTH,
        num_layers=3,
        num_heads=4,
        mlp_dim=64,
        norm="layernorm",
        norm_bias=True,
        norm_eps=1e-6,
        activation="gelu",
        attention_bias=True,
        mlp_bias=True,
        positions="learned",
        max_positions=12,
        input="tokens",
        class_token=False,
        pooling="mean",
        num_classes=None,
        vocab_size=24,
        causal=name.endswith("causal"),
    )
    table = {"token_embedding": {"embedding": golden["x"].reshape(-1, WIDTH)}}
    table["position_embedding"] = {"embedding": np.zeros((12, WIDTH), np.float32)}
    tokens = jnp.arange(24).reshape(2, 12)

    def apply(params):
        output = hn.Encoder(config).apply({"params": table | params}, tokens)
        return output.last_hidden_state

    _check(apply, _deit_params(golden, "param/"), golden, _deit_params(golden, "grad/"))


@pytest.fixture
def scaled_residual():
    """ResiDual with the factors of the golden residual_scaled."""
    name = "residual_scaled_of_a_test"

    @hn.scheme(name, final_norm=False, side_stream=hn.SideStream(start_scale=0.5, main_scale=0.7, side_norm_eps=1e-7))
    def rule(layer, num_layers):
        sublayer = hn.SublayerPlacement(post=True, side="written", side_scale=0.5)
        return hn.BlockPlacement(sublayer, sublayer)

    yield name
    del hn.SCHEMES[name]


@pytest.mark.parametrize("name", ["residual", "residual_scaled"])
def test_residual_is_reproduced(name, scaled_residual):
    golden = _golden(name)
    config = _residual_config("residual" if name == "residual" else scaled_residual)
    tokens = jnp.asarray(golden["tokens"])
    _check(
        lambda params: hn.Decoder(config).apply({"params": params}, tokens),
        _residual_params(golden, "param/"),
        golden,
        _residual_params(golden, "grad/"),
    )
