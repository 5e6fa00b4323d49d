"""Every scheme of the table, as a whole model: what NumPy makes of it, without a loop, and on eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal, others_are_long
from flax.traverse_util import flatten_dict, unflatten_dict

import hybridnorm_jax as hn
from hybridnorm_jax.model.placement import HIDDEN_NORMS
from tests.model.fresh_leaves import fresh_leaves
from tests.model.numpy_decoder import forward
from tests.schemes import keys_of

TINY = {"d_model": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24, "vocab_size": 61}


def _has_learned_part(placement):
    sublayers = placement.attention, placement.feed_forward
    scales = any(sublayer.layer_scale or sublayer.residual_vector for sublayer in sublayers)
    return scales or placement.has_side_stream or bool(placement.head_scales) or placement.normalizes_hidden


# Of schemes with equal placements one.
ALL = sorted({hn.SCHEMES[name].placements(TINY["num_layers"]): name for name in reversed(hn.schemes())}.values())
# Those with parts that have no tests of their own; the others are slow.
NEW = [name for name in ALL if any(map(_has_learned_part, hn.SCHEMES[name].placements(4)))]
SLOW = [name for name in ALL if name not in NEW]
# Those of which devices hold parts: scales of heads and of hidden channels, two streams, a sphere.
SPLIT = ("hybrid_rezero", "normformer_residual", "siamese_attn_norm", "ngpt")
ACTIVATIONS = ("swiglu", "gelu")


def _config(scheme, **keys):
    return hn.ModelConfig(**keys_of(scheme), **(TINY | {"dtype": "float64", "param_dtype": "float64"} | keys))


def _unrolled(config, params):
    """The parameters of Decoder(unrolled=True)."""
    layers = {}
    for path, leaf in flatten_dict(params).items():
        if not path[0].startswith("run_"):
            layers[path] = leaf
            continue
        start = config.runs[int(path[0].removeprefix("run_"))].start
        layers |= {(f"layer_{start + place}", *path[1:]): part for place, part in enumerate(leaf)}
    return unflatten_dict(layers)


PAIRS = [
    *diagonal(NEW, ACTIVATIONS, apart=2),
    *(pytest.param(name, each, marks=pytest.mark.slow) for name in SLOW for each in ACTIVATIONS),
]


def _double(scheme, activation):
    return _config(scheme, activation=activation, norm="layernorm", norm_bias=True)


@pytest.mark.parametrize(("scheme", "activation"), PAIRS)
def test_the_decoder_is_the_one_in_numpy(scheme, activation, random_params, tokens):
    config = _double(scheme, activation)
    with jax.enable_x64(True):
        params = random_params(config)
        found = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
    expected = forward(config, params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * max(1, np.abs(expected).max()))


@pytest.mark.long  # text is continued without a loop, by schemes of each kind: test_generate.py
@pytest.mark.parametrize(("scheme", "activation"), PAIRS)
def test_the_decoder_is_the_one_without_a_loop(scheme, activation, random_params, tokens):
    config = _double(scheme, activation)
    with jax.enable_x64(True):
        params = random_params(config)
        scanned = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
        unrolled = hn.Decoder(config, unrolled=True)
        alone = jax.jit(unrolled.apply)({"params": _unrolled(config, params)}, tokens)
    np.testing.assert_allclose(alone, scanned, rtol=0, atol=1e-12 * max(1, np.abs(scanned).max()))


@pytest.mark.parametrize(
    "scheme",
    [*others_are_long(NEW, SPLIT), *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_eight_devices_equal_one(scheme, random_params, tokens):
    """Loss and gradients, with heads and hidden channels split; float64, so that a missing sum cannot hide."""
    tokens = np.tile(tokens, (4, 1))
    with jax.enable_x64(True):
        config = _config(scheme, remat="full")
        params = random_params(config)

        def loss(params, tokens):
            logits = hn.Decoder(config).apply({"params": params}, tokens)
            return jnp.square(jax.nn.log_softmax(logits)).mean()

        value_and_grad = jax.jit(jax.value_and_grad(loss))
        alone = jax.device_get(value_and_grad(params, tokens))
        mesh = hn.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        with hn.use_mesh(mesh):
            placed = jax.device_put(params, hn.tree_shardings(params, mesh))
            together = jax.device_get(jax.jit(jax.value_and_grad(loss))(placed, tokens))
    for ours, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10 * max(1e-3, np.abs(expected).max()))


def test_a_documents_tokens_do_not_see_another_document(random_params, tokens):
    """Norms inside the FFN and scales of heads act on each token alone."""
    for scheme in ("normformer_residual", "simple_norm", "sub_ln", "siamese_post_pre"):
        config = _config(scheme, dtype="float32", param_dtype="float32")
        params = random_params(config)
        ids = jnp.asarray(np.repeat([[0] * 5 + [1] * 7], 2, axis=0))
        places = jnp.asarray(np.repeat([[*range(5), *range(7)]], 2, axis=0))
        apply = jax.jit(hn.Decoder(config).apply)
        packed = apply({"params": params}, tokens, positions=places, segment_ids=ids)
        alone = apply({"params": params}, tokens[:, 5:])
        np.testing.assert_allclose(packed[:, 5:], alone, rtol=0, atol=2e-5)


# ---- Where learned scales start, and how matrices do.


def _starts(scheme, pattern="scale$", **keys):
    """Leaves with this in their paths as they are drawn, by layer: path in the block -> (layers, ...)."""
    config = _config(scheme, dtype="float32", param_dtype="float32", **keys)
    (_,) = config.runs
    return {path.removeprefix("run_0/"): leaf for path, leaf in fresh_leaves(config, f"^run_0/.*{pattern}").items()}


def test_scales_that_start_at_another_number_in_each_layer_share_one_loop():
    found = _starts("layernorm_scaling_learned")
    for sublayer in ("attention", "feed_forward"):
        scale = found[f"{sublayer}_pre_norm/scale"]
        np.testing.assert_allclose(scale, np.repeat([[1], [2**-0.5], [3**-0.5], [0.5]], 16, axis=1), rtol=1e-7)
    stored_less_one = _starts("layernorm_scaling_learned", norm_scale_plus_one=True)
    np.testing.assert_allclose(stored_less_one["attention_pre_norm/scale"][3], -0.5, rtol=1e-6)


def test_learned_scales_behind_branches_start_small_or_at_zero():
    for scheme, start, shape in (("hybrid_layer_scale", 0.1, (4, 16)), ("hybrid_skipinit", 0.0, (4, 1))):
        found = _starts(scheme)
        for sublayer in ("attention", "feed_forward"):
            np.testing.assert_allclose(found[f"{sublayer}_layer_scale/scale"], np.full(shape, start), rtol=1e-7)
    shared = _starts("hybrid_rezero")
    np.testing.assert_array_equal(shared["attention_layer_scale/scale"], np.zeros((4, 1)))
    assert "feed_forward_layer_scale/scale" not in shared
    starts = [hn.SCHEMES["hybrid_layer_scale"].block(0, depth).attention.layer_scale_init for depth in (18, 24, 36)]
    assert starts == [0.1, 1e-5, 1e-6]  # CaiT, section 4


def test_a_block_alone_starts_where_its_placement_says():
    config = _config("layernorm_scaling_learned", dtype="float32", param_dtype="float32")
    block = hn.Block(config=config, placement=config.placements[3], layer=3)
    norm = jax.jit(lambda x: block.init(jax.random.key(0), x)["params"]["attention_pre_norm"])(jnp.zeros((1, 2, 16)))
    np.testing.assert_array_equal(norm["scale"], np.full(16, 0.5))


def test_residual_vectors_and_scales_of_heads_start_at_1():
    found = _starts("normformer_residual")
    np.testing.assert_array_equal(found["feed_forward_residual_vector/scale"], np.ones((4, 16)))
    np.testing.assert_array_equal(found["attention/head_scales/scale"], np.ones((4, 4)))
    assert found["feed_forward/hidden_norm/scale"].shape == (4, 24)


@pytest.mark.parametrize("scheme", ["sub_ln", "simple_norm", "deepnorm", "b2t"])
def test_matrices_start_as_their_authors_say(scheme):
    """The standard deviation over init_std, of layer l of 4: torchscale, SimpleGPT, B2T read off and measured."""
    found, normal = (_starts(scheme, "kernel$", init_std=0.1, **keys) for keys in ({}, {"initializer": "normal"}))
    gain = {"sub_ln": np.log(8) ** 0.5, "deepnorm": 32**-0.25, "b2t": 0.5, "simple_norm": (2 * np.arange(1, 5)) ** -0.5}
    untouched = {
        **{"sub_ln": {"query", "key"}, "deepnorm": {"query", "key"}},
        **{"simple_norm": {"query", "key", "value", "gate"}, "b2t": set()},
    }
    assert len(found) == 7
    for path, matrix in found.items():
        expected = np.ones(4) * (1 if path.split("/")[-2] in untouched[scheme] else gain[scheme])
        ratio = np.array([a.ravel()[0] / b.ravel()[0] for a, b in zip(matrix, normal[path], strict=True)])
        np.testing.assert_allclose(ratio, expected, rtol=1e-5, err_msg=path)


# ---- Bad input.


@pytest.mark.parametrize("scheme", [name for name in hn.SCHEMES if hn.SCHEMES[name].block(1, 2).normalizes_hidden])
def test_experts_have_no_norm_inside(scheme):
    with pytest.raises(hn.ConfigError, match=r"model.num_experts=4: model.scheme=\w+ has norms or scales inside"):
        _config(scheme, num_experts=4, experts_per_token=2)


def test_two_learned_scales_behind_a_branch_are_refused():
    with pytest.raises(hn.ConfigError, match=r"model.layer_scale=true: model.scheme=hybrid_rezero has a learned scale"):
        _config("hybrid_rezero", layer_scale=True)


def test_scales_of_parts_need_equal_parts():
    with pytest.raises(hn.ConfigError, match=r"model.num_heads=3: must divide model.d_model=16"):
        _config("normformer", num_heads=3, num_kv_heads=3, head_dim=4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre_norm_init": 0.5}, "pre_norm_init=0.5: starts a scale that is not there without pre=True"),
        ({"branch_norm_init": 0.5}, "branch_norm_init=0.5: .* without branch=True"),
        ({"layer_scale_init": 0.0}, "layer_scale_init=0.0: .* without layer_scale"),
        ({"layer_scale": "vector"}, "layer_scale='vector' must be one of None, 'channel', 'scalar'"),
        ({"residual_vector": 1.5}, "residual_vector=1.5 must be one of"),
    ],
)
def test_impossible_sublayers_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        hn.SublayerPlacement(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"head_scales": "behind"}, "head_scales='behind' must be one of None, 'before', 'after'"),
        ({"shared_layer_scale": True}, "shared_layer_scale=True needs the same layer_scale in both"),
        *(({name: "yes"}, f"{name}='yes' must be one of False, True") for name in HIDDEN_NORMS),
    ],
)
def test_impossible_blocks_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        hn.BlockPlacement(**keys)


@pytest.mark.parametrize("fraction", [0.125, 0.29, 1.0])
def test_mix_ln_takes_any_fraction(fraction):
    hn.scheme("mixed")(hn.mix_ln(fraction))
    posts = [placement.attention.post for placement in hn.SCHEMES["mixed"].placements(100)]
    count = {0.125: 12, 0.29: 29, 1.0: 100}[fraction]
    assert posts == [True] * count + [False] * (100 - count)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_mix_ln_refuses_what_is_no_fraction(fraction):
    with pytest.raises(ValueError, match=f"fraction={fraction}: must be between 0 and 1"):
        hn.mix_ln(fraction)


# ---- Pre-(C)RMSNorm: norms inside a branch do not touch the stream.


@pytest.mark.parametrize("form", ["to_pre_rmsnorm", "to_pre_crmsnorm"])
def test_a_model_with_norms_inside_its_branches_converts(form, random_params, tokens):
    config = _config("sub_ln", norm="layernorm", norm_bias=True, activation="gelu")
    with jax.enable_x64(True):
        params = random_params(config)
        converted, theirs = getattr(hn.equivalence, form)(config, params)
        expected = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
        logits = jax.jit(hn.Decoder(converted).apply)({"params": theirs}, tokens)
    assert converted.norm != "layernorm"
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


def test_what_changes_the_stream_is_not_converted():
    vector = hn.SublayerPlacement(pre=True, residual_vector=True)
    scaled = hn.SublayerPlacement(pre=True, layer_scale="scalar")
    pre = hn.SublayerPlacement(pre=True)
    for name, placement, right in (
        ("vector", hn.BlockPlacement(pre, vector), "a learned residual vector at feed_forward of layer 0"),
        ("scaled", hn.BlockPlacement(scaled, pre), "a learned scale behind attention of layer 0"),
        ("heads", hn.BlockPlacement(pre, pre, head_scales="after"), "scales of heads behind the output projection"),
    ):
        hn.scheme(name)(lambda layer, num_layers, placement=placement: placement)
        obstacle = dataclasses.replace(_config("pre"), scheme=name, norm="layernorm").pre_layernorm_obstacle
        assert right in obstacle


def test_scales_of_heads_before_the_output_projection_convert(random_params, tokens):
    pre = hn.SublayerPlacement(pre=True)
    hn.scheme("heads_before")(lambda layer, num_layers: hn.BlockPlacement(pre, pre, head_scales="before"))
    config = _config("heads_before", norm="layernorm", norm_bias=True)
    with jax.enable_x64(True):
        params = random_params(config)
        converted, theirs = hn.equivalence.to_pre_crmsnorm(config, params)
        expected = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
        logits = jax.jit(hn.Decoder(converted).apply)({"params": theirs}, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)
