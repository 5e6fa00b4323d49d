"""The NNX modules are the Linen ones, and the Linen ones work inside somebody's NNX model through flax.nnx.bridge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from covering import others_are_long
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

import hybridnorm_jax as hn
from hybridnorm_jax.kernels.swiglu import SwigluClamp


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
        model = nnx.jit(lambda: nnx.bridge.lazy_init(Scorer(config, nnx.Rngs(0)), tokens))()
        state = nnx.state(model, nnx.Param)
        assert _shapes(nnx.to_pure_dict(state)) == _shapes(params)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(model, state)

        def linen(params):
            logits = hn.Decoder(config).apply({"params": params["decoder"]}, tokens)
            normed = hn.Norm(kind="layernorm", use_bias=True).apply({"params": params["norm"]}, logits)
            return (normed @ params["score"]["kernel"] + params["score"]["bias"])[..., 0]

        def loss(scores):
            return jnp.square(scores).mean(), scores

        ours, scores = nnx.jit(nnx.grad(lambda model: loss(model(tokens)), has_aux=True))(model)
        expected, right = jax.jit(jax.grad(lambda params: loss(linen(params)), has_aux=True))(params)
        assert _error(scores, right) < 1e-12
        ours = nnx.to_pure_dict(ours)
        assert _shapes(ours) == _shapes(expected)
        for path, leaf in flatten_dict(expected).items():
            assert np.linalg.norm(leaf) > 0, path
            assert _error(flatten_dict(ours)[path], leaf) < 1e-10, path


# ---- hybridnorm_jax.nnx

WIDTH = 32
MOE = {"num_experts": 4, "experts_per_token": 2, "mlp_dim": 24}
CLAMPED = MOE | {"activation": "swiglu_clamped", "clamp": SwigluClamp(0.5, 1.3)}
CLAMPED |= {"use_bias": True, "shared_experts": 1, "shared_gate": True, "shared_gate_bias": True}
MIXED = {
    **{"scheme": "parallel_one_norm_qk", "num_experts": 4, "experts_per_token": 2, "dense_layers": (0,)},
    **{"norm_scale_plus_one": True, "layer_scale": True, "embedding_scale": 2.0, "logit_cap": 5.0, "dense_mlp_dim": 40},
}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "q_norm": "head", "context_norm": "projection", "rope_theta": 1e4}


def _pairs(small_config):
    """{name: (makes the NNX module, the Linen module, an input)}."""
    config, mixed = small_config(scheme="hybrid_star"), small_config(**MIXED)
    placement = hn.SCHEMES["keel"].block(1, 3)
    rng = np.random.default_rng(7)
    stream = rng.standard_normal((2, 12, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    return {
        "Norm": (lambda rngs: hn.nnx.Norm(WIDTH, kind="layernorm", rngs=rngs), hn.Norm(kind="layernorm"), stream),
        "Attention": (lambda rngs: hn.nnx.Attention(WIDTH, rngs=rngs, **ATTENTION), hn.Attention(**ATTENTION), stream),
        "FeedForward": (lambda rngs: hn.nnx.FeedForward(WIDTH, mlp_dim=24, rngs=rngs), hn.FeedForward(24), stream),
        "MoE": (lambda rngs: hn.nnx.MoE(WIDTH, rngs=rngs, **MOE), hn.MoE(**MOE), stream),
        "MoE, clamped": (lambda rngs: hn.nnx.MoE(WIDTH, rngs=rngs, **CLAMPED), hn.MoE(**CLAMPED), stream),
        "Block": (lambda rngs: hn.nnx.Block(config, placement, rngs=rngs), hn.Block(config, placement), stream),
        "Block without experts": (
            lambda rngs: hn.nnx.Block(mixed, placement, layer=0, rngs=rngs),
            hn.Block(mixed, placement, layer=0),
            stream,
        ),
        "Decoder, mixed": (lambda rngs: hn.nnx.Decoder(mixed, rngs=rngs), hn.Decoder(mixed), tokens),
        "Decoder": (lambda rngs: hn.nnx.Decoder(config, rngs=rngs), hn.Decoder(config), tokens),
        **{f"Norm {kind}": _norm(kind, stream) for kind in hn.NORM_KINDS},
        **{f"Decoder {kind}": _decoder(small_config(scheme="hybrid", norm=kind, **SCALED), tokens) for kind in OWN},
    }


# Kinds with parameters besides scale and bias.
OWN = [name for name, kind in hn.NORM_KINDS.items() if kind.parameters]
SCALED = {"norm_bias": True, "learned_embedding_scale": True}


def _norm(kind, stream):
    return (
        lambda rngs: hn.nnx.Norm(WIDTH, kind=kind, use_bias=True, rngs=rngs),
        hn.Norm(kind=kind, use_bias=True),
        stream,
    )


def _decoder(config, tokens):
    return lambda rngs: hn.nnx.Decoder(config, rngs=rngs), hn.Decoder(config), tokens


def _assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


_call = nnx.jit(lambda module, x: module(x))  # one program, where a call would compile each of its operations


def _loss_and_result(model, x):
    y = model(x)
    return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum(), y


def _loss(model, x):
    return _loss_and_result(model, x)[0]


NAMES = ["Norm", "Attention", "FeedForward", "MoE", "Block", "Decoder"]
NAMES += ["MoE, clamped", "Block without experts", "Decoder, mixed"]
NAMES += [*(f"Norm {kind}" for kind in hn.NORM_KINDS), *(f"Decoder {kind}" for kind in OWN)]


# The mixed decoder has all that the plain one has, and what a norm has of its own are parameters like all others.
QUICK = [name for name in NAMES if not name.startswith("Decoder") or name in ("Decoder, mixed", "Decoder gated")]


@pytest.fixture(scope="module")
def started():
    """What `pair` has started."""
    return {}


@pytest.fixture
def pair(name, small_config, started):
    """(an NNX module, the Linen one, an input); the test may change the module. Each is compiled and started once."""
    if name not in started:
        make, linen, x = _pairs(small_config)[name]
        started[name] = make(nnx.Rngs(0)), linen, x
    module, linen, x = started[name]
    return nnx.clone(module), linen, x


@pytest.mark.parametrize("name", others_are_long(NAMES, QUICK))
def test_a_module_starts_and_computes_as_the_linen_one(name, pair):
    module, linen, x = pair
    # Of as small an input as the module starts from, so that it is the same program, and compiled once.
    sample = x[0, 0] if name.startswith("Norm") else x[:1, :1]
    params = jax.jit(linen.init)(nnx.Rngs(0).params(), sample)["params"]
    _assert_same(hn.nnx.to_linen_params(module), params)

    ours, y = nnx.jit(nnx.grad(_loss_and_result, has_aux=True))(module, x)

    def theirs(params, x):
        return _loss_and_result(partial(linen.apply, {"params": params}), x)

    expected, right = jax.jit(jax.grad(theirs, has_aux=True))(params, x)
    np.testing.assert_array_equal(y, right)
    ours = nnx.to_pure_dict(ours)
    assert _shapes(ours) == _shapes(expected)
    for path, leaf in flatten_dict(expected).items():
        # The same program but for the order of its arguments.
        np.testing.assert_allclose(flatten_dict(ours)[path], leaf, rtol=1e-5, atol=1e-6 * np.abs(leaf).max())


@pytest.mark.parametrize("name", others_are_long(NAMES, QUICK))
def test_parameters_go_to_linen_and_back_without_loss(pair):
    other, _, x = pair
    one = nnx.clone(other)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape), nnx.state(other, nnx.Param))
    nnx.update(other, jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), moved, nnx.state(other, nnx.Param)))
    params = hn.nnx.to_linen_params(one)
    assert np.abs(_call(one, x) - _call(other, x)).max() > 0
    hn.nnx.from_linen_params(other, params)
    _assert_same(hn.nnx.to_linen_params(other), params)
    np.testing.assert_array_equal(_call(one, x), _call(other, x))


def test_a_module_starts_from_the_stream_of_parameters():
    """Or from the default one, as above."""
    starts = [
        hn.nnx.to_linen_params(hn.nnx.FeedForward(WIDTH, mlp_dim=24, rngs=rngs))
        for rngs in (nnx.Rngs(0), nnx.Rngs(params=0), nnx.Rngs(1, params=0), nnx.Rngs(1))
    ]
    _assert_same(starts[0], starts[1])
    _assert_same(starts[0], starts[2])
    assert not np.array_equal(starts[0]["up"]["kernel"], starts[3]["up"]["kernel"])


def test_parameters_are_attributes(small_config):
    model = hn.nnx.Decoder(small_config(scheme="hybrid_star"), rngs=nnx.Rngs(0))
    assert isinstance(model.run_1.attention.query.kernel, nnx.Param)
    assert model.run_1.attention.query.kernel.shape == (2, 32, 4, 8)
    before = _call(model, np.zeros((1, 3), np.int32))
    model.final_norm.scale[...] = 2 * model.final_norm.scale[...]
    np.testing.assert_allclose(_call(model, np.zeros((1, 3), np.int32)), 2 * before, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda params: params["final_norm"].pop("scale"),
            "^final_norm/scale: missing; the module has such a parameter",
        ),
        (lambda params: params.update(more={"kernel": jnp.ones(3)}), "^more/kernel: the module has no such parameter"),
        (lambda params: params["head"].update(kernel=jnp.ones((3, 3))), r"^head/kernel: is float32\[3, 3\], but the"),
        (
            lambda params: params["final_norm"].update(scale=jnp.ones(32, jnp.bfloat16)),
            r"^final_norm/scale: is bfloat16\[32\], but the module's is float32\[32\]",
        ),
    ],
    ids=["missing", "more", "shape", "dtype"],
)
def test_parameters_of_another_model_are_refused(change, message, small_config):
    model = hn.nnx.Decoder(small_config(scheme="hybrid_star"), rngs=nnx.Rngs(0))
    before = hn.nnx.to_linen_params(model)
    params = jax.tree.map(lambda leaf: leaf + 1, before)
    change(params)
    with pytest.raises(hn.UserError, match=message):
        hn.nnx.from_linen_params(model, params)
    _assert_same(hn.nnx.to_linen_params(model), before)


def test_dropout_follows_train_and_eval_and_needs_rngs(small_config, tokens):
    config = small_config(dropout=0.5)
    model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
    plain = hn.Decoder(config).apply({"params": hn.nnx.to_linen_params(model)}, tokens)
    for rngs in (None, 1):
        with pytest.raises(ValueError, match=r"rngs=(None|1): dropout=0\.5 is on .* or switch dropout off with eval"):
            model(tokens, rngs=rngs)
    whole = nnx.Dict(part=model)  # as part of somebody's model
    whole.eval()
    np.testing.assert_array_equal(model(tokens), plain)
    np.testing.assert_array_equal(model(tokens, rngs=nnx.Rngs(3)), plain)
    whole.train()
    assert np.abs(model(tokens, rngs=nnx.Rngs(3)) - plain).max() > 0.01


def test_dropout_differs_by_rngs(small_config, tokens):
    model = hn.nnx.Decoder(small_config(dropout=0.5), rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(dropout=3)
    first, second, again = model(tokens, rngs=rngs), model(tokens, rngs=rngs), model(tokens, rngs=nnx.Rngs(dropout=3))
    assert np.abs(first - second).max() > 0
    np.testing.assert_array_equal(first, again)


def test_inputs_and_collections_are_those_of_linen(small_config, tokens):
    config = small_config(scheme="span", num_experts=4, experts_per_token=2)
    model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
    variables = {"params": hn.nnx.to_linen_params(model)}
    inputs = {"positions": np.arange(12)[None] // 2, "segment_ids": np.arange(12)[None] // 5}
    keys = {"mutable": ["router"], "return_hidden": True}
    y, sown = nnx.jit(lambda model, tokens, inputs: model(tokens, **keys, **inputs))(model, tokens, inputs)
    linen = partial(hn.Decoder(config).apply, **keys)
    expected, theirs = jax.jit(lambda variables, tokens, inputs: linen(variables, tokens, **inputs))(
        variables, tokens, inputs
    )
    np.testing.assert_array_equal(y, expected)
    _assert_same(sown, theirs)
    assert y.shape == (2, 12, 32)
    assert sown["router"]["run_0"]["feed_forward"]["statistics"][0].fraction.shape == (1, 4)


def test_an_optimizer_step_is_that_of_optax_on_the_linen_tree(small_config, tokens):
    config = small_config(scheme="hybrid_star")
    model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
    params = hn.nnx.to_linen_params(model)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, gradient = nnx.value_and_grad(_loss)(model, tokens)
        optimizer.update(model, gradient)
        return loss

    linen_gradient = jax.jit(
        jax.grad(lambda params: _loss(partial(hn.Decoder(config).apply, {"params": params}), tokens))
    )
    losses = [float(step(model, optimizer, tokens)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    for _ in range(3):
        gradient = linen_gradient(params)
        params = jax.tree.map(lambda leaf, change: leaf - 1e-3 * change, params, gradient)
    for path, leaf in flatten_dict(params).items():
        assert _error(flatten_dict(hn.nnx.to_linen_params(model))[path], leaf) < 1e-5, path


def test_split_and_merge(small_config, tokens):
    config = small_config(scheme="hybrid_star")
    model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(_call(nnx.merge(graph, state), tokens), _call(model, tokens))
    # Two models of one configuration are one program to jax.jit.
    assert graph == nnx.split(hn.nnx.Decoder(config, rngs=nnx.Rngs(1)))[0]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, state)
    assert np.abs(_call(nnx.merge(graph, doubled), tokens) - _call(model, tokens)).max() > 0
    shapes = nnx.eval_shape(lambda: hn.nnx.Decoder(config, rngs=nnx.Rngs(0)))
    assert _shapes(nnx.to_pure_dict(nnx.state(shapes))) == _shapes(hn.nnx.to_linen_params(model))


def test_a_model_on_eight_devices(small_config, tokens):
    config = small_config(scheme="hybrid_star", vocab_size=64)
    mesh = hn.make_mesh({"fsdp": 4, "tensor": 2})
    model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
    tokens = np.concatenate([tokens, tokens])  # fsdp splits the batch too
    expected = nnx.jit(nnx.value_and_grad(_loss))(model, tokens)
    params = hn.nnx.to_linen_params(model)
    hn.nnx.from_linen_params(model, jax.device_put(params, hn.tree_shardings(params, mesh)))
    query = model.run_1.attention.query.kernel
    assert query.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert query[...].addressable_shards[0].data.shape == (2, 8, 2, 8)

    with hn.use_mesh(mesh):
        loss, gradient = nnx.jit(nnx.value_and_grad(_loss))(model, tokens)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    ours, theirs = (flatten_dict(nnx.to_pure_dict(tree)) for tree in (gradient, expected[1]))
    for path, leaf in theirs.items():
        assert _error(ours[path], leaf) < 1e-5, path


def test_a_model_that_is_born_on_eight_devices(small_config):
    config = small_config(scheme="hybrid_star", vocab_size=64)
    mesh = hn.make_mesh({"fsdp": 8})

    @nnx.jit
    def create():
        model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
        params = hn.nnx.to_linen_params(model)
        placed = jax.lax.with_sharding_constraint(params, hn.tree_shardings(params, mesh))
        hn.nnx.from_linen_params(model, placed)
        return model

    model = create()
    assert model.run_1.feed_forward.up.kernel.sharding.spec == PartitionSpec(None, "fsdp")
    expected = hn.nnx.to_linen_params(hn.nnx.Decoder(config, rngs=nnx.Rngs(0)))
    _assert_same(hn.nnx.to_linen_params(model), expected)


def test_a_checkpoint_of_orbax_and_one_of_a_run(small_config, tokens, tmp_path):
    config = small_config(scheme="hybrid_star")
    model, other = (hn.nnx.Decoder(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", nnx.to_pure_dict(nnx.state(other)))
    hn.nnx.from_linen_params(other, restored)
    np.testing.assert_array_equal(_call(other, tokens), _call(model, tokens))

    hn.save_run(str(tmp_path / "run"), hn.RunConfig(model=config), hn.nnx.to_linen_params(model))
    loaded_config, params = hn.load_run(str(tmp_path / "run"))
    loaded = hn.nnx.Decoder(loaded_config.model, rngs=nnx.Rngs(2))
    hn.nnx.from_linen_params(loaded, params)
    np.testing.assert_array_equal(_call(loaded, tokens), _call(model, tokens))


def test_norm_over_several_axes():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    norm = hn.nnx.Norm(4, reduction_axes=(1, 2), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(x), hn.rms_norm(x, jnp.ones(4), eps=1e-6, axis=(1, 2)))
    with pytest.raises(ValueError, match=r"^feature_axes=\(1, 2\): must be -1"):
        hn.nnx.Norm(4, feature_axes=(1, 2), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="eps"):
        hn.nnx.Norm(4, eps=1e-5, rngs=nnx.Rngs(0))


def test_a_kernel_of_another_platform_is_no_obstacle_to_initializing(small_config):
    config = small_config(scheme="pre", attention="splash", dtype="bfloat16", head_dim=128)
    model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        model(np.zeros((1, 128), np.int32))
