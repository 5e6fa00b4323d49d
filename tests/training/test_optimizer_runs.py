"""Runs with every optimizer: stopped and resumed bit for bit, trained at once, begun with parameters, evaluated."""

import jax
import numpy as np
import pytest
from bitwise import assert_bitwise
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.lab.together import check_can_be_together
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.optimizers.schedule_free import averaged_params
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.resume import restore

pytestmark = pytest.mark.usefixtures("shared_programs")

SMALL = [
    *("model.d_model=16", "model.num_heads=2", "model.num_kv_heads=1", "model.mlp_dim=24", "model.num_layers=2"),
    *("model.scheme=pre",),
    *("model.vocab_size=61", "model.scan_unroll=1", "model.remat=none", "train.batch_size=4", "train.seq_len=8"),
    *("train.steps=6", "optimizer.schedule=constant", "optimizer.learning_rate=1e-2", "optimizer.warmup_steps=2"),
    *("data.source=tokens", "data.validation_fraction=0", "checkpoint.every=2", "checkpoint.keep=9", "eval.batches=2"),
]
NAMES = {
    "adafactor": ["name=adafactor"],
    "lion": ["name=lion"],
    "muon": ["name=muon", "rate_factors={'head/*': 0.5}", "muon_rate_factor=2", "moment_dtype=bfloat16"],
    "schedule_free": ["name=schedule_free"],
}


def _config(name, *words):
    chosen = [f"optimizer.{word}" for word in NAMES[name]]
    return parse([*SMALL, *chosen, "data.files=[tokens.npy]", *words])


def _batch(seed):
    tokens = np.random.default_rng(seed).integers(0, 61, (1, 4, 8)).astype(np.int32)
    return {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}


def _trained(program, state, steps):
    for seed in steps:
        state, metrics = program.train_step(state, _batch(seed))
    return state, metrics


# One whose state is built unlike AdamW's; the others take as long to compile.
EACH = others_are_long(NAMES, ["schedule_free"])


@pytest.mark.parametrize("name", EACH)
def test_a_saved_state_goes_on_bit_for_bit(name, tmp_path):
    config = _config(name, "mesh.data=1", "mesh.fsdp=2")
    program = Program(config, make_mesh(config.mesh.sizes, jax.devices()[:2]))
    state, _ = _trained(program, program.fresh_state(), range(2))
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(2, state, data_state={}, config_yaml="", plugins=[], wait=True)
        expected = jax.device_get(_trained(program, state, range(2, 5))[0])
        restored, _ = restore(program, checkpoints, 2)
    assert_bitwise(_trained(program, restored, range(2, 5))[0], expected)


@pytest.mark.parametrize("name", EACH)
def test_a_step_that_is_not_finite_changes_nothing(name):
    config = _config(name, "mesh.data=1", "mesh.fsdp=2")
    program = Program(config, make_mesh(config.mesh.sizes, jax.devices()[:2]))
    state, _ = _trained(program, program.fresh_state(), range(2))
    before = jax.device_get(state)
    bad = _batch(0)
    bad["weights"][0, 0, 0] = np.inf
    after, _ = program.train_step(state, bad)
    assert int(after.anomalies.nonfinite) == 1
    for part in ("params", "opt_state", "average"):
        # The count of the learning-rate schedule goes on.
        arrays = [[leaf for leaf in jax.tree.leaves(getattr(state, part)) if leaf.ndim] for state in (after, before)]
        assert_bitwise(*arrays)


# XLA orders sums otherwise for several runs. The sign of a mean near zero may turn then, which changes a few numbers by
# a learning rate of 1e-2 (lion). Muon iterates in float32: bfloat16 products of other last bits would differ by 1e-3.
ALIKE = {"adafactor": 1e-5, "schedule_free": 1e-5, "lion": 1e-2, "muon": 1e-5}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_runs_that_are_trained_at_once_end_as_they_would_one_by_one(name):
    own = ["mesh.data=1", *(["optimizer.muon_dtype=float32"] if name == "muon" else [])]
    program = Program(_config(name, *own), make_mesh({"data": 1}, jax.devices()[:1]))
    others = [program.sharing(_config(name, *own, *words)) for words in ([], ["optimizer.weight_decay=9"])]
    single = [jax.device_get(_trained(one, one.fresh_state(), range(3))[0]) for one in others]
    group = program.grouped.joined([one.fresh_state() for one in others])
    for seed in range(3):
        group, _ = program.grouped.train(group, program.put(_batch(seed), leading=1), [one.numbers for one in others])

    def distances(left, right):
        pairs = zip(jax.tree.leaves(left.params), jax.tree.leaves(right.params), strict=True)
        return [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in pairs]

    for index, expected in enumerate(single):
        found = jax.device_get(program.grouped.of_run(group, index))
        assert max(distances(found, expected)) <= ALIKE[name]
    assert max(distances(*single)) > 0.1


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    np.save(tmp_path / "held.npy", np.random.default_rng(1).integers(0, 61, 500).astype(np.uint16))
    return ["data.validation.held=[held.npy]", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4"]


def test_the_average_of_schedule_free_is_evaluated_loaded_and_begun_with(tokens):
    config = _config("schedule_free", *tokens, "run.name=first", "run.dir=runs", "eval.plain=true")
    loop.train(config)
    program = Program(config)
    with Checkpoints("runs/first/checkpoints", keep=1) as checkpoints:
        state, _ = restore(program, checkpoints, 6)
    average = averaged_params(state.opt_state, state.params)
    _, loaded = hn.load_run("runs/first")
    _, plain = hn.load_run("runs/first", plain=True)
    assert_bitwise(state.average.params, loaded)
    assert_bitwise(state.params, plain)
    for (path, left), right in zip(jax.tree.leaves_with_path(average), jax.tree.leaves(loaded), strict=True):
        # The step and this line round (y - (1 - b1) z) / b1 on their own.
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    assert np.linalg.norm(loaded["head"]["kernel"] - plain["head"]["kernel"]) > 1e-3
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    heir = program.state_with(jax.device_put(loaded, places))
    # z begins with these parameters, too: otherwise the first step would go back to what was drawn.
    begun = averaged_params(heir.opt_state, heir.params)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, rtol=4e-7, atol=1e-8), begun, loaded)
    assert_bitwise(heir.params, loaded)
    assert_bitwise(heir.average.params, loaded)


def test_what_schedule_free_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.name=schedule_free: model\.scheme=ngpt keeps its matrices"):
        _config("schedule_free", "model.scheme=ngpt")
    with pytest.raises(ConfigError, match=r"optimizer\.name=schedule_free: model\.balance_bias=true moves biases"):
        _config("schedule_free", "model.num_experts=4", "model.experts_per_token=2", "model.balance_bias=true")


@pytest.mark.long
@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_matrices_of_ngpt_keep_their_length(name):
    program = Program(_config(name, "model.scheme=ngpt", "mesh.data=1"), make_mesh({"data": 1}, jax.devices()[:1]))
    state, _ = _trained(program, program.fresh_state(), range(2))
    start = program.fresh_state().params["run_0"]["feed_forward"]["up"]["kernel"]
    kernel = np.asarray(state.params["run_0"]["feed_forward"]["up"]["kernel"])
    assert np.linalg.norm(kernel - start) > 1e-2
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=1), 1, rtol=1e-5)


def test_all_optimizers_can_be_trained_at_once():
    for name in NAMES:
        check_can_be_together(_config(name, "train.sample_tokens=0"), 2)
