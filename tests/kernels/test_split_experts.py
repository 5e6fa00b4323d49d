"""Experts on eight devices compute what they compute on one, gradients included, however the tokens fall on them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

from hybridnorm_jax.config.run_config import MeshSection, OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.expert_dispatch import apply_experts
from hybridnorm_jax.kernels.split_experts import apply_experts_on_mesh
from hybridnorm_jax.kernels.swiglu import ExpertKernels
from hybridnorm_jax.mesh.device_mesh import make_mesh, use_mesh
from hybridnorm_jax.mesh.sharding_rules import resolve_rules
from hybridnorm_jax.training.program import Program

BATCH, SEQ, EMBED, MLP, EXPERTS, K = 8, 6, 8, 12, 8, 3
AXES = ("data", "fsdp", "expert", "tensor")
MESHES = [(1, 1, 8, 1), (2, 1, 2, 2), (1, 2, 4, 1), (1, 1, 2, 4), (2, 2, 1, 2), (1, 4, 2, 1)]
QUICK = [(1, 1, 8, 1), (2, 1, 2, 2), (1, 1, 2, 4), (2, 2, 1, 2)]
ROUTINGS = {
    "any": 0.0,
    "skewed": np.linspace(3, 0, EXPERTS),
    "all to three neighbours": np.where(np.isin(np.arange(EXPERTS), (2, 3, 4)), 5.0, 0),
}


def _mesh(shape):
    return make_mesh(dict(zip(AXES, shape, strict=True)), jax.devices()[: math.prod(shape)])


def _inputs(scores, batch=BATCH):
    rng = np.random.default_rng(0)
    shapes = (batch, SEQ, EMBED), (EXPERTS, EMBED, MLP), (EXPERTS, EMBED, MLP), (EXPERTS, MLP, EMBED), (batch, SEQ, K)
    inputs = tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    return inputs, jnp.asarray(np.argsort(-(rng.random((batch, SEQ, EXPERTS)) + scores), axis=-1)[..., :K])


def _value_and_gradients(function, inputs, chosen, cotangent):
    def both(inputs, chosen, cotangent):
        value, pull = jax.vjp(lambda *inputs: function(*inputs, chosen), *inputs)
        return value, *pull(cotangent)

    return jax.jit(both)(inputs, chosen, cotangent)


def _expected(inputs, chosen, cotangent):
    def flat(x, gate, up, down, weights, chosen):
        rows = (array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
        x_rows, weight_rows, chosen_rows = rows
        kernels = ExpertKernels(gate, up, down)
        return apply_experts(x_rows, kernels, weight_rows, chosen_rows, dispatch="dense").reshape(x.shape)

    return _value_and_gradients(flat, inputs, chosen, cotangent)


def _on_mesh(dispatch):
    def function(x, gate, up, down, weights, chosen):
        return apply_experts_on_mesh(x, ExpertKernels(gate, up, down), weights, chosen, dispatch=dispatch)

    return function


def _assert_equal(got, expected):
    for name, ours, reference in zip(("y", "x", "gate", "up", "down", "weights"), got, expected, strict=True):
        reference = np.asarray(reference)
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-10 * np.abs(reference).max(), err_msg=name)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", others_are_long(MESHES, QUICK), ids=str)
def test_a_mesh_equals_one_device(shape, routing):
    with jax.enable_x64(True):
        inputs, chosen = _inputs(ROUTINGS[routing])
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape))
        expected = _expected(inputs, chosen, cotangent)
        with use_mesh(_mesh(shape)):
            got = _value_and_gradients(_on_mesh("blocked"), inputs, chosen, cotangent)
    _assert_equal(got, expected)


@pytest.mark.parametrize("dispatch", ["dense", "ragged"])
def test_every_dispatch_runs_on_a_mesh(dispatch):
    with jax.enable_x64(True):
        inputs, chosen = _inputs(ROUTINGS["skewed"])
        cotangent = jnp.ones_like(inputs[0])
        expected = _expected(inputs, chosen, cotangent)
        with use_mesh(_mesh((2, 1, 2, 2))):
            got = _value_and_gradients(_on_mesh(dispatch), inputs, chosen, cotangent)
    _assert_equal(got, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": ("data+tensor",), "embed": ("data",), "mlp": ("tensor",)},
        {"batch": ("data+expert+tensor",)},
        {"batch": ("data",), "mlp": ("data",)},
        {"batch": ("data",), "embed": ("tensor",), "mlp": ("tensor",)},
        {"seq": ("tensor",)},
        {"experts": ("expert+tensor",), "mlp": ("fsdp",), "embed": ("fsdp",)},
    ],
    ids=str,
)
def test_rules_by_which_dimensions_share_an_axis(changes):
    """Tokens of devices whose results are summed have to be the same ones."""
    with jax.enable_x64(True):
        inputs, chosen = _inputs(ROUTINGS["skewed"])
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape))
        expected = _expected(inputs, chosen, cotangent)
        with use_mesh(_mesh((2, 1, 2, 2)), resolve_rules(changes)):
            got = _value_and_gradients(_on_mesh("blocked"), inputs, chosen, cotangent)
    _assert_equal(got, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_the_mesh_does_not_divide_is_computed_whole(batch):
    """One sequence, as a check of invariants or a sample of text takes it: the experts are split all the same."""
    with jax.enable_x64(True):
        inputs, chosen = _inputs(0.0, batch)
        cotangent = jnp.ones_like(inputs[0])
        expected = _expected(inputs, chosen, cotangent)
        with use_mesh(_mesh((2, 1, 2, 2))):
            got = _value_and_gradients(_on_mesh("blocked"), inputs, chosen, cotangent)
    _assert_equal(got, expected)


def _config(small_config, mesh=(1, 1, 1, 1), **model):
    axes = dict(zip(AXES, mesh, strict=True))
    keys = {"num_experts": 8, "experts_per_token": 3, "num_kv_heads": 4} | model
    return RunConfig(
        model=small_config(**keys),
        train=TrainSection(batch_size=8, seq_len=16, steps=20, balance_loss=0.1, router_z_loss=0.01),
        optimizer=OptimizerSection(learning_rate=3e-3, schedule="constant"),
        mesh=MeshSection(**axes),
    )


def _train(config, devices, steps=3):
    rng = np.random.default_rng(0)
    shape = (1, config.train.batch_size, config.train.seq_len)
    batch = {
        "tokens": rng.integers(0, 61, shape).astype(np.int32),
        "targets": rng.integers(0, 61, shape).astype(np.int32),
        "weights": np.ones(shape, np.float32),
    }
    program = Program(config, make_mesh(config.mesh.sizes, jax.devices()[:devices]))
    state, history = program.fresh_state(), []
    for _ in range(steps):
        state, metrics = program.train_step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


@pytest.fixture
def alone(small_config):
    """Three steps on one device."""
    return _train(_config(small_config, shared_experts=1, balance_bias=True, remat="full"), 1)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(1, 2, 2, 2), pytest.param((1, 1, 4, 2), marks=pytest.mark.slow)], ids=str)
def test_training_on_eight_devices_equals_one(shape, small_config, alone):
    one, expected = alone
    together, got = _train(_config(small_config, shape, shared_experts=1, balance_bias=True, remat="full"), 8)
    for ours, reference in zip(got, expected, strict=True):
        assert ours.keys() == reference.keys()
        for name in ("loss", "balance_loss", "router_z_loss", "router_entropy"):
            np.testing.assert_allclose(ours[name], reference[name], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(ours["grad_norm"], reference["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(ours["expert_fraction"], reference["expert_fraction"], atol=1e-7)
    # Sums are taken in another order; Adam's division by the root of small second moments amplifies that.
    for (path, left), right in zip(
        jax.tree.leaves_with_path(together.params), jax.tree.leaves(one.params), strict=True
    ):
        left, right = np.asarray(left), np.asarray(right)
        assert np.linalg.norm(left - right) < 1e-4 * np.linalg.norm(right), jax.tree_util.keystr(path)
    gate = together.params["run_1"]["feed_forward"]["expert_gate"]["kernel"]
    _, fsdp, expert, tensor = shape
    assert gate.addressable_shards[0].data.shape == (2, 8 // expert, 32 // fsdp, 48 // tensor)


def test_experts_that_the_mesh_cannot_divide_are_refused(small_config):
    with pytest.raises(ConfigError, match=r"mesh\.expert=8: must divide .*, model\.num_experts=6"):
        Program(_config(small_config, (1, 1, 8, 1), num_experts=6))
    dense = {"num_experts": 0, "experts_per_token": None}
    with pytest.raises(ConfigError, match=r"mesh\.expert=2: a dense model has no experts to split, model\.num_experts"):
        Program(_config(small_config, (4, 1, 2, 1), **dense))


def _lowered(devices, shape, dispatch, dtype=jnp.bfloat16, platforms=None):
    """Value and gradients on a mesh of these devices, lowered from shapes alone."""
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)), devices)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = (8, 128, 256), (8, 256, 128), (8, 256, 128), (8, 128, 256), (8, 128, 2)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    chosen = jax.ShapeDtypeStruct((8, 128, 2), jnp.int32, sharding=place)

    def both(inputs, chosen, cotangent):
        value, pull = jax.vjp(lambda *inputs: _on_mesh(dispatch)(*inputs, chosen), *inputs)
        return value, *pull(cotangent)

    with use_mesh(mesh):
        traced = jax.jit(both).trace(inputs, chosen, inputs[0])
        return traced.lower(lowering_platforms=platforms)


@pytest.mark.parametrize(("dispatch", "kernels"), [("gmm", 11), ("fused", 6), ("blocked", 0)])
def test_compiles_for_eight_tpu_chips(tpu_devices, dispatch, kernels):
    text = _lowered(list(tpu_devices), (1, 2, 2, 2), dispatch).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    assert " all-gather" in text
    assert " all-to-all" in text


@pytest.mark.parametrize("dispatch", ["dense", "blocked", "ragged"])
def test_lowers_for_gpu(dispatch):
    text = _lowered(jax.devices(), (1, 2, 2, 2), dispatch, platforms=("cuda",)).as_text()
    assert "all_gather" in text
    assert "reduce_scatter" in text
