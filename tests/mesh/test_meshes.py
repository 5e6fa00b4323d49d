"""Every mesh computes what one device computes: loss and gradient of dense models and of mixtures of experts."""

import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import MeshSection, OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.mesh.sharding_rules import DEFAULT_RULES, MESH_AXES, resolve_rules
from hybridnorm_jax.mesh.shardings import partition_spec, undivided
from hybridnorm_jax.training.program import Program

BATCH, SEQ = 8, 32
SIZES = {
    "scheme": "hybrid",
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "vocab_size": 61,
}
EXPERTS = {"num_experts": 8, "experts_per_token": 3}


def _config(mesh, experts, **train):
    return RunConfig(
        model=hn.ModelConfig(**SIZES, **(EXPERTS if experts else {})),
        train=TrainSection(batch_size=BATCH, seq_len=SEQ, steps=5, loss_chunk=16, balance_loss=0.1, **train),
        optimizer=OptimizerSection(learning_rate=3e-3, schedule="constant"),
        mesh=MeshSection(**({"data": 1} | mesh)),
    )


def _one_step(mesh, experts, start=None):
    """(state before, loss, gradient after clipping) of one step; `start`: of a state on other devices."""
    config = _config(mesh, experts)
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, 61, (1, BATCH, SEQ)).astype(np.int32) for _ in range(2))
    segments = np.broadcast_to(np.arange(SEQ) // 11, tokens.shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(SEQ) % 11, tokens.shape).astype(np.int32)
    batch = {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}
    batch |= {"segment_ids": segments, "positions": positions}
    program = Program(config, make_mesh(config.mesh.sizes, jax.devices()[: math.prod(config.mesh.sizes.values())]))
    if start is None:
        start = jax.device_get(program.fresh_state())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    state, metrics = program.train_step(jax.device_put(start, shardings), batch)
    moments = [state for state in jax.tree.leaves(state.opt_state, is_leaf=_has_moments) if _has_moments(state)]
    return start, float(metrics["loss"]), jax.tree.map(lambda leaf: leaf / 0.1, jax.device_get(moments[0].mu))


def _has_moments(state):
    return hasattr(state, "mu")


@pytest.fixture(scope="module")
def alone():
    """The step on one device, dense and with experts."""
    return {experts: _one_step({}, experts) for experts in (False, True)}


EACH_ALONE = [{axis: 8} for axis in MESH_AXES]
TOGETHER = [
    {"replica": 2, "fsdp": 4},
    {"replica": 2, "context": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"context": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "context": 4},
    {"data": 4, "tensor": 2},
    {"replica": 2, "data": 2, "expert": 2},
    {"context": 4, "expert": 2},
    {"fsdp": 4, "expert": 2},
    {"replica": 2, "fsdp": 2, "expert": 2},
]
ALL = [
    {axis: size for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1}
    for shape in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES))
    if math.prod(shape) == 8
]
# Every axis beside others, with and without experts.
QUICK = (*("replica2-fsdp4", "replica2-context2-tensor2", "data2-fsdp2-context2", "fsdp2-expert2-tensor2"),)
RARE = [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ALL if mesh not in (*EACH_ALONE, *TOGETHER)]


def _name(mesh):
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


USUAL = [
    pytest.param(mesh, marks=() if _name(mesh) in QUICK else pytest.mark.long) for mesh in (*EACH_ALONE, *TOGETHER)
]


@pytest.mark.parametrize("mesh", [*USUAL, *RARE], ids=_name)
def test_eight_devices_equal_one(mesh, alone):
    # Experts where the mesh splits them, and in every second mesh otherwise.
    experts = "expert" in mesh or (len(mesh) + sum(map(len, mesh))) % 2 == 0
    start, expected_loss, expected = alone[experts]
    _, loss, gradient = _one_step(mesh, experts, start)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for (path, left), right in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(left - right) < 1e-5 * np.linalg.norm(right), jax.tree_util.keystr(path)


def test_all_shapes_of_at_most_three_axes_are_there():
    assert all(len(mesh) <= 3 for mesh in ALL)
    assert len(ALL) == 56
    assert all(mesh in ALL for mesh in (*EACH_ALONE, *TOGETHER))


def test_a_dimension_takes_the_next_rule_that_divides_it_and_is_free():
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    rules = resolve_rules({"vocab": ("tensor+context", "tensor"), "mlp": ("tensor", "fsdp")})
    embed = ("fsdp", "context")
    assert partition_spec(("vocab", "embed"), (64, 32), mesh, rules) == PartitionSpec(("tensor", "context"), "fsdp")
    assert partition_spec(("vocab", "embed"), (62, 32), mesh, rules) == PartitionSpec("tensor", embed)
    assert partition_spec(("vocab", "embed"), (61, 31), mesh, rules) == PartitionSpec(None, None)
    assert partition_spec(("embed", "mlp"), (31, 48), mesh, rules) == PartitionSpec(None, "tensor")


def test_the_report_says_what_lies_elsewhere():
    config = _config({"fsdp": 2, "context": 2, "tensor": 2}, experts=False)
    program = Program(config)
    odd = {"head": {"kernel": jax.ShapeDtypeStruct((62, 61), np.float32)}}
    assert undivided(odd, program.mesh) == [
        "embed=62 is split by fsdp alone: not divisible by fsdp x context",
        "vocab=61 stays whole: not divisible by tensor",
    ]


def test_rules_of_a_run_decide_where_parameters_lie():
    rules = {"vocab": ("fsdp",), "embed": ()}
    config = _config({"fsdp": 4, "tensor": 2, "rules": rules}, experts=False)
    wide = RunConfig(**{**vars(config), "model": hn.ModelConfig(**SIZES | {"vocab_size": 64})})
    program = Program(wide)
    head = program.abstract_state.params["head"]["kernel"]
    assert head.sharding.spec == PartitionSpec(None, "fsdp")
    assert program.abstract_state.params["run_0"]["feed_forward"]["up"]["kernel"].sharding.spec == PartitionSpec(
        None, None, "tensor"
    )


def test_parameters_that_are_not_experts_are_split_over_the_expert_axis_too():
    config = _config({"fsdp": 2, "expert": 4}, experts=True)
    state = Program(config).abstract_state
    (moments,) = [each for each in jax.tree.leaves(state.opt_state, is_leaf=_has_moments) if _has_moments(each)]
    for (path, leaf), moment in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(moments.mu), strict=True):
        if "norm" in jax.tree_util.keystr(path):
            continue  # whole on every device
        on_one_device = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert on_one_device == leaf.size // 8, jax.tree_util.keystr(path)
        assert moment.sharding == leaf.sharding


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"vocabulary": ("tensor",)}, r"mesh\.rules\.vocabulary: not a logical axis; did you mean 'vocab'"),
        ({"vocab": ("tensors",)}, r"mesh\.rules\.vocab: 'tensors' is not a mesh axis; did you mean 'tensor'"),
        ({"vocab": ("tensor+tensor",)}, r"mesh\.rules\.vocab: tensor\+tensor names an axis twice"),
        ({"batch": ("data", "fsdp")}, r"mesh\.rules\.batch=\[data, fsdp\]: must be one entry"),
        ({"batch": ()}, r"mesh\.rules\.batch=\[\]: must be one entry"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        MeshSection(rules=rules)


def test_default_rules_name_every_mesh_axis():
    named = {axis for entries in DEFAULT_RULES.values() for entry in entries for axis in entry.split("+")}
    assert named == set(MESH_AXES)


class _Device:
    """A stand-in for a TPU of one of several slices."""

    platform, device_kind, process_index = "tpu", "TPU v5e", 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.coords, self.core_on_chip = number, slice_index, (number % 4, 0, 0), 0


def test_replicas_lie_across_slices():
    devices = [_Device(number, number // 4) for number in range(8)]
    with pytest.raises(ConfigError, match=r"mesh\.replica=1: must be a multiple of the 2 slices"):
        make_mesh({"fsdp": 8}, devices)
