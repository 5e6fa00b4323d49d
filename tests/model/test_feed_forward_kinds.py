"""Every activation, gate and kind of expert is what NumPy makes of it, and dense layers may stand among experts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import MeshSection, OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.expert_dispatch import resolve_dispatch
from hybridnorm_jax.kernels.swiglu import SwigluClamp
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.model.config_feed_forward import ACTIVATIONS, CLAMPED, GATED
from hybridnorm_jax.model.feed_forward import FUNCTIONS as TABLE
from hybridnorm_jax.model.moe import MoE, choose_experts
from hybridnorm_jax.training.layer_measures import layer_norms
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.throughput import model_flops_per_token
from tests.model.fresh_leaves import fresh_leaves
from tests.model.numpy_decoder import FUNCTIONS, GATES, forward

EXPERTS = {"scheme": "pre", "num_experts": 4, "experts_per_token": 2}
# A limit that random numbers reach, on both sides of it.
CLAMP = {"activation": "swiglu_clamped", "clamp_limit": 0.5, "clamp_alpha": 1.3}
MIXED = {**EXPERTS, "num_layers": 5, "dense_layers": (0, 3), "dense_mlp_dim": 40}
KINDS = {
    **{f"activation {name}": {"scheme": "pre", "activation": name} for name in ACTIVATIONS},
    "clamped, with biases": {"scheme": "pre", "mlp_bias": True, **CLAMP},
    "a bias on down alone": {"scheme": "pre", "mlp_output_bias": True},
    "no bias on down": {"scheme": "pre", "mlp_bias": True, "mlp_output_bias": False, "activation": "gelu_tanh"},
    "shared experts of another width": {**EXPERTS, "shared_experts": 1, "shared_mlp_dim": 24},
    "a gate on the shared experts": {**EXPERTS, "shared_experts": 1, "shared_mlp_dim": 24, "shared_expert_gate": True},
    "a gate with a bias": {**EXPERTS, "shared_experts": 1, "shared_expert_gate": True, "shared_expert_gate_bias": True},
    "gpt-oss": {**EXPERTS, **CLAMP, "mlp_bias": True, "normalize_expert_weights": True},
    "clamped, with a shared expert": {**EXPERTS, **CLAMP, "shared_experts": 1},
    "a router bias alone": {**EXPERTS, "router_bias": True},
    "no router bias": {**EXPERTS, "mlp_bias": True, "router_bias": False},
    "experts with a bias on down alone": {**EXPERTS, "mlp_output_bias": True, "shared_experts": 2},
    "experts without a bias on down": {**EXPERTS, "mlp_bias": True, "mlp_output_bias": False, "shared_experts": 2},
    "dense layers among experts": MIXED,
    "dense layers among shared experts, post": {**MIXED, "scheme": "hybrid_star", "shared_experts": 1},
    "a dense first layer": {**EXPERTS, "dense_layers": (0,), "mlp_bias": True, **CLAMP},
}


# Of the activations, which the next test has all, one with a gate and one without.
QUICK = [name for name in KINDS if not name.startswith("activation ")] + ["activation geglu", "activation relu_squared"]


@pytest.mark.parametrize("name", others_are_long(KINDS, QUICK))
def test_the_decoder_is_the_one_in_numpy(name, small_config, random_params, tokens):
    config = small_config(**KINDS[name], dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        params = random_params(config)
        logits = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens)
    expected = forward(config, params, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != CLAMPED])
def test_a_layer_is_the_one_in_numpy(activation):
    rng = np.random.default_rng(0)
    x, names = rng.standard_normal((3, 5)), ("gate", "up") if activation in GATED else ("up",)
    params = {name: {"kernel": rng.standard_normal((5, 7))} for name in names}
    params |= {"down": {"kernel": rng.standard_normal((7, 5))}}
    layer = hn.FeedForward(mlp_dim=7, activation=activation, dtype=jnp.float64, param_dtype=jnp.float64)
    with jax.enable_x64(True):
        y = jax.jit(layer.apply)({"params": params}, x)
    up = x @ params["up"]["kernel"]
    if activation in GATED:
        hidden = FUNCTIONS[GATES[activation]](x @ params["gate"]["kernel"]) * up
    else:
        hidden = FUNCTIONS[activation](up)
    expected = hidden @ params["down"]["kernel"]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_the_tables_agree():
    assert {*TABLE, CLAMPED} == set(ACTIVATIONS) == {*FUNCTIONS, *GATES, CLAMPED}
    assert {*GATES, CLAMPED} == set(GATED)


@pytest.mark.parametrize("activation", ["reglu_squared", "relu_squared", "gelu_quick", "geglu_quick", "swiglu_clamped"])
def test_gradients_of_a_layer_are_finite_differences(activation):
    layer = hn.FeedForward(
        mlp_dim=7, activation=activation, clamp=SwigluClamp(0.5, 1.3), dtype=jnp.float64, param_dtype=jnp.float64
    )
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((2, 3, 5)))
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), layer.init(jax.random.key(0), x)
        )
        jax.test_util.check_grads(layer.apply, (params, x), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dispatch", ["dense", "blocked", "ragged"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_clamped_experts_and_their_gradients_are_the_same_by_every_dispatch(dispatch, use_bias):
    keys = {
        "num_experts": 4,
        "experts_per_token": 2,
        "mlp_dim": 6,
        "activation": CLAMPED,
        "clamp": SwigluClamp(0.5, 1.3),
    }
    layer = MoE(**keys, use_bias=use_bias, dispatch=dispatch, dtype=jnp.float64, param_dtype=jnp.float64)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((2, 5, 8)))
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), shapes)

        def loss(params, x):
            return jnp.sin(layer.apply(params, x)).sum()

        def by_hand(params, x):
            return _by_hand(params["params"], x, layer).sum()

        ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
        theirs = jax.jit(jax.value_and_grad(by_hand, (0, 1)))(params, x)
    for (path, left), right in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-11, err_msg=jax.tree_util.keystr(path))


def _by_hand(params, x, layer):
    """sin of the layer, every expert on every token, in plain jax.numpy."""
    logits = x @ params["router"]["kernel"] + params["router"].get("bias", 0)
    p, total = jax.nn.softmax(logits), 0
    kept = p >= jnp.sort(p, -1)[..., -layer.experts_per_token, None]
    for expert in range(layer.num_experts):
        gate, up = (
            x @ params[name]["kernel"][expert] + (params[name]["bias"][expert] if layer.use_bias else 0)
            for name in ("expert_gate", "expert_up")
        )
        gate, up = jnp.minimum(gate, layer.clamp.limit), jnp.clip(up, -layer.clamp.limit, layer.clamp.limit)
        hidden = gate / (1 + jnp.exp(-layer.clamp.alpha * gate)) * (up + 1)
        out = hidden @ params["expert_down"]["kernel"][expert]
        out = out + (params["expert_down"]["bias"][expert] if layer.use_bias else 0)
        total = total + jnp.where(kept, p, 0)[..., expert, None] * out
    return jnp.sin(total)


def test_kernels_with_swiglu_inside_refuse_clamped_experts():
    for name, platform in (("fused", "tpu"), ("grouped", "gpu")):
        with pytest.raises(ConfigError, match=f"model.expert_dispatch={name}: has SwiGLU inside"):
            resolve_dispatch(name, platform=platform, dtype="bfloat16", clamped=True)
    chosen = {each: resolve_dispatch("auto", platform=each, dtype="bfloat16", clamped=True) for each in ("tpu", "gpu")}
    assert chosen == {"tpu": "gmm", "gpu": "blocked"}


def test_normalized_weights_are_the_softmax_of_the_largest_logits():
    logits = np.random.default_rng(0).standard_normal((2, 5, 6))
    with jax.enable_x64(True):
        weights, chosen = choose_experts(jnp.asarray(logits), 3, normalize=True)
    largest = np.take_along_axis(logits, np.argsort(-logits)[..., :3], -1)
    np.testing.assert_array_equal(chosen, np.argsort(-logits)[..., :3])
    softmax = np.exp(largest) / np.exp(largest).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, softmax, rtol=1e-14)


def test_dense_layers_are_runs_of_their_own(small_config):
    config = small_config(**MIXED)
    assert [(run.start, run.length, run.has_experts) for run in config.runs] == [
        *((0, 1, False), (1, 2, True)),
        *((3, 1, False), (4, 1, True)),
    ]
    params = hn.model.abstract_params.abstract_params(config)
    assert params["run_0"]["feed_forward"]["up"]["kernel"].shape == (1, 32, 40)
    assert params["run_1"]["feed_forward"]["expert_up"]["kernel"].shape == (2, 4, 32, 48)
    norms = layer_norms(jax.tree.map(lambda leaf: np.ones(leaf.shape), params))
    assert list(np.isnan(norms["feed_forward/up"])) == [False, True, True, False, True]
    assert list(np.isnan(norms["feed_forward/router"])) == [True, False, False, True, False]


def test_flops_count_the_layers_that_are_there(small_config):
    config = small_config(**MIXED, shared_experts=1, shared_mlp_dim=24, shared_expert_gate=True)
    params = hn.model.abstract_params.abstract_params(config)
    weights = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            weights += math.prod(leaf.shape) * (0.5 if "expert_" in name and "shared" not in name else 1)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * 16 / 2
    assert model_flops_per_token(config, 16) == 6 * weights + attention


CONTINUED = ["dense layers among experts", "a gate on the shared experts", "gpt-oss"]


@pytest.mark.parametrize("name", others_are_long(CONTINUED, CONTINUED[:1]))
def test_text_is_continued_by_the_whole_model(name, small_config, random_params):
    config = small_config(**KINDS[name])
    params = random_params(config)
    prompt, count = np.arange(1, 6), 4
    (new,) = hn.generate(config, params, [prompt], max_new_tokens=count)
    text = list(prompt)
    for _ in range(count):
        text.append(int(forward(config, params, np.asarray([text]))[0, -1].argmax()))
    assert list(new) == text[len(prompt) :]


def _one_step(keys, mesh, start=None, **changes):
    """(state before, metrics, state after) of one step of training."""
    model = hn.ModelConfig(
        **{"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 61, "num_layers": 3} | keys
    )
    config = RunConfig(
        model=dataclasses.replace(model, **changes),
        train=TrainSection(batch_size=8, seq_len=16, steps=5, loss_chunk=8, balance_loss=0.1),
        optimizer=OptimizerSection(learning_rate=3e-3, schedule="constant", balance_bias_rate=0.01),
        mesh=MeshSection(**({"data": 1} | mesh)),
    )
    sizes = config.mesh.sizes
    program = Program(config, make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]))
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, 61, (1, 8, 16)).astype(np.int32) for _ in range(2))
    batch = {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}
    batch |= {"segment_ids": np.zeros_like(tokens), "positions": np.broadcast_to(np.arange(16), tokens.shape)}
    batch["positions"] = batch["positions"].astype(np.int32)
    if start is None:
        start = jax.device_get(program.fresh_state())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    state, metrics = program.train_step(jax.device_put(start, shardings), batch)
    return start, jax.device_get(metrics), jax.device_get(state)


MESHES = [{"fsdp": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}]
DENSE_AMONG_EXPERTS = {
    **EXPERTS,
    **{"num_layers": 4, "dense_layers": (2,), "dense_mlp_dim": 40, "balance_bias": True},
    **{"shared_experts": 1, "shared_mlp_dim": 24, "shared_expert_gate": True, "shared_expert_gate_bias": True},
}
GPT_OSS = {**KINDS["gpt-oss"], "layer_scale": True, "logit_cap": 5.0, "norm_scale_plus_one": True}
TRAINED = {
    "everything": DENSE_AMONG_EXPERTS | GPT_OSS | {"num_layers": 2, "dense_layers": (0,)},
    "dense among experts, gated and balanced": DENSE_AMONG_EXPERTS,
    "gpt-oss": GPT_OSS,
}


@functools.cache
def _on_one_device(name):
    return _one_step(TRAINED[name], {})


CASES = [(name, number) for name in TRAINED for number in range(len(MESHES))]


@pytest.mark.parametrize("case", others_are_long(CASES, [("everything", 1)]), ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_step_on_eight_devices_is_that_of_one(case):
    name, mesh = case[0], MESHES[case[1]]
    start, metrics, state = _on_one_device(name)
    _, sharded_metrics, sharded = _one_step(TRAINED[name], mesh, start)
    for key in ("loss", "grad_norm", "balance_loss", "router_balance", "largest_load"):
        np.testing.assert_allclose(sharded_metrics[key], metrics[key], rtol=2e-5, err_msg=key)
    np.testing.assert_allclose(sharded_metrics["expert_fraction"], metrics["expert_fraction"], atol=1e-6)
    moments, sharded_moments = (_first_moments(each.opt_state) for each in (state, sharded))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(sharded_moments), jax.tree.leaves(moments), strict=True):
        scale = max(np.abs(theirs).max(), 1e-6)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


def _first_moments(opt_state):
    has_moments = [
        each for each in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(each, "mu")
    ]
    return has_moments[0].mu


@pytest.mark.parametrize(
    "name", others_are_long(["everything", "dense among experts, gated and balanced"], ["everything"])
)
def test_router_metrics_are_of_the_layers_with_experts(name, small_config):
    start, metrics, state = _on_one_device(name)
    runs = [(number, run) for number, run in enumerate(small_config(**TRAINED[name]).runs) if run.has_experts]
    assert metrics["expert_fraction"].shape == (sum(run.length for _, run in runs), 4)
    first = 0
    for number, run in runs:
        fractions = metrics["expert_fraction"][first : first + run.length]
        before, after = (each.params[f"run_{number}"]["feed_forward"]["balance_bias"] for each in (start, state))
        moved = after - before
        np.testing.assert_allclose(moved, 0.01 * np.sign(fractions.mean(1, keepdims=True) - fractions), rtol=1e-5)
        first += run.length


@pytest.mark.long  # every run of layers is computed again alike: test_decoder.py, and with experts test_moe.py
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_what_is_computed_again_is_the_same(remat):
    name = "dense among experts, gated and balanced"
    start, metrics, _ = _on_one_device(name)
    _, again, _ = _one_step(TRAINED[name], {}, start, remat=remat)
    np.testing.assert_allclose(again["grad_norm"], metrics["grad_norm"], rtol=1e-5)


def test_a_block_alone_knows_from_its_layer_whether_it_has_experts(small_config):
    config = small_config(**MIXED)
    x = jnp.ones((1, 2, 32))
    for layer, has_experts in enumerate(config.has_experts):
        block = hn.Block(config, config.placements[layer], layer=layer)
        params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]["feed_forward"]
        assert ("router" in params) is has_experts
        assert ("up" in params) is not has_experts


def test_layers_draw_the_same_numbers_whatever_stands_before_them(small_config):
    """A layer of experts starts the same whether the layer before it is dense or not."""
    mixed, all_experts = small_config(**MIXED), small_config(**{**EXPERTS, "num_layers": 5})
    ours, theirs = (fresh_leaves(each, "expert_up/kernel") for each in (mixed, all_experts))
    np.testing.assert_array_equal(
        ours["run_1/feed_forward/expert_up/kernel"], theirs["run_0/feed_forward/expert_up/kernel"][1:3]
    )
