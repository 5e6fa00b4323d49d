"""Schemes with a side stream: SiameseNorm's vision transformer, what is measured, and what is refused.

tests/interop/test_authors.py has the decoders of their authors.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.model.outside import outer_norm
from hybridnorm_jax.model.side_stream import JoinedStreams
from hybridnorm_jax.training.layer_measures import measure_signal
from tests.model.numpy_decoder import forward

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


def _check(apply, params, golden, expected):
    """Output, loss and gradients are those of the golden; a bias of keys has none but rounding."""

    def loss_fn(params):
        output = apply(params)
        return jnp.square(output).mean(), output

    (loss, output), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(output, golden["output"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if "'key'" in name and "'bias'" in name:
            assert np.abs(ours).max() < 1e-7
            continue
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-5, (name, error)


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


# ---- In the rest of the library. tests/model/test_every_scheme.py has NumPy, loops and devices; tests/generation has
# ---- the cache; tests/interop has PyTorch: each takes its schemes from the table.

SCHEMES = ["siamese_hybrid_pre", "siamese_post_pre", "residual"]
TINY = {"d_model": 16, "num_layers": 3, "num_heads": 4, "mlp_dim": 24, "vocab_size": 61}


@pytest.mark.parametrize("scheme", others_are_long(SCHEMES, ["residual", "siamese_post_pre"]))
def test_both_streams_are_measured_before_and_behind_every_block(scheme, random_params, tokens):
    with jax.enable_x64(True):
        config = hn.ModelConfig(scheme=scheme, **TINY, dtype="float64", param_dtype="float64", remat="full")
        params = random_params(config)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": np.ones((2, 11)),
            "segment_ids": np.zeros((2, 11), np.int32),
            "positions": np.tile(np.arange(11), (2, 1)),
        }
        measures, _ = jax.jit(functools.partial(measure_signal, hn.Decoder(config)))(params, batch)

        outer = {name: branch for name, branch in params.items() if name != "run_0"}
        layers = [jax.tree.map(lambda stacked, layer=layer: stacked[layer], params["run_0"]) for layer in range(3)]

        def loss(nudges):
            x = params["token_embedding"]["embedding"][batch["tokens"]]
            streams = hn.Streams(x + nudges[0].main, x + nudges[0].side)
            found = [streams]
            for layer, own in enumerate(layers):
                block = hn.Block(config=config, placement=config.placements[layer], layer=layer)
                after = block.apply({"params": own}, streams)
                streams = hn.Streams(after.main + nudges[layer + 1].main, after.side + nudges[layer + 1].side)
                found.append(streams)
            hidden = JoinedStreams(config).apply({"params": outer["streams"]}, streams)
            decoder = hn.Decoder(config)
            if config.has_final_norm:
                hidden = outer_norm(config).apply({"params": outer["final_norm"]}, hidden)
            logits = decoder.apply({"params": params}, hidden, method="logits")
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
            return -picked.mean(), found

        zero = jnp.zeros((2, 11, 16))
        nudges = [hn.Streams(zero, zero)] * 4
        (_, streams), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(nudges)
    for which, prefix in (("main", ""), ("side", "side_")):
        rms = [np.sqrt(np.mean(np.square(getattr(each, which)))) for each in streams]
        np.testing.assert_allclose(measures[f"{prefix}stream_rms"], rms, rtol=1e-10)
        norms = [np.linalg.norm(getattr(each, which)) for each in gradients]
        np.testing.assert_allclose(measures[f"{prefix}stream_gradient"], norms, rtol=1e-9)
        assert measures[f"{prefix}token_similarity"].shape == (4,)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_and_packed_documents_have_two_streams_too(scheme, random_params, tokens):
    config = hn.ModelConfig(scheme=scheme, **TINY, num_experts=4, experts_per_token=2, expert_dispatch="dense")
    params = random_params(config)
    ids = jnp.asarray(np.repeat([[0] * 5 + [1] * 7], 2, axis=0))
    places = jnp.asarray(np.repeat([[*range(5), *range(7)]], 2, axis=0))
    apply = jax.jit(hn.Decoder(config).apply)
    packed = apply({"params": params}, tokens, positions=places, segment_ids=ids)
    alone = apply({"params": params}, tokens[:, 5:])
    np.testing.assert_allclose(packed[:, 5:], alone, rtol=0, atol=5e-5)
    whole = forward(config, params, tokens)
    np.testing.assert_allclose(apply({"params": params}, tokens), whole, rtol=0, atol=2e-4 * np.abs(whole).max())


def test_the_two_factors_of_granite_reach_both_streams():
    config = hn.ModelConfig(scheme="residual", **TINY, branch_multiplier=0.5)
    for sublayer in (config.placements[0].attention, config.placements[0].feed_forward):
        assert (sublayer.branch_scale, sublayer.side_scale) == (0.5, 0.5)


# ---- Bad input.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_of_two_streams_is_not_converted(scheme):
    config = hn.ModelConfig(scheme=scheme, norm="layernorm", **TINY)
    assert config.pre_layernorm_obstacle == f"model.scheme={scheme}: a second stream"


def test_a_block_says_how_many_streams_it_needs():
    x = jnp.zeros((1, 2, 16))
    for scheme, given, right in (("residual", x, r"hn\.Streams\(main, side\)"), ("pre", hn.Streams(x, x), "one array")):
        config = hn.ModelConfig(scheme=scheme, **TINY)
        with pytest.raises(ValueError, match=f"x: the placement of this block needs {right}"):
            hn.Block(config=config, placement=config.placements[0]).init(jax.random.key(0), given)


def test_a_scheme_that_asks_for_a_stream_it_does_not_have_is_refused():
    two, one = hn.SublayerPlacement(side="written"), hn.SublayerPlacement()
    hn.scheme("without_ends")(lambda layer, num_layers: hn.BlockPlacement(two, two))
    with pytest.raises(hn.ConfigError, match=r"model\.scheme=without_ends: .*layer 0 of 3.* has a side stream; side_"):
        hn.ModelConfig(scheme="without_ends", **TINY)
    hn.scheme("without_stream", side_stream=hn.SideStream())(lambda layer, num_layers: hn.BlockPlacement(one, one))
    with pytest.raises(hn.ConfigError, match="has no side stream"):
        hn.ModelConfig(scheme="without_stream", **TINY)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"side": "both"}, "side='both' must be one of"),
        ({"side_scale": 2.0}, "side_scale=2.0: there is no side stream"),
        ({"side": "written", "side_own": "norm"}, "side_own='norm': only where the side stream is read"),
        ({"side": "read", "reads": "block"}, "side='read': .* not with reads='block'"),
        ({"side": "read", "side_own": "matrix"}, "side_own='matrix' must be one of"),
    ],
)
def test_impossible_sublayers_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        hn.SublayerPlacement(**parts)


def test_impossible_blocks_and_ends_are_refused():
    with pytest.raises(ValueError, match="side: both sublayers of a block have the side stream, or neither"):
        hn.BlockPlacement(hn.SublayerPlacement(side="written"), hn.SublayerPlacement())
    with pytest.raises(ValueError, match="start_scale=nan must be a number"):
        hn.SideStream(start_scale=float("nan"))
