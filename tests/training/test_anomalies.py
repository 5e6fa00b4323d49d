"""Steps that are skipped: what stays, what is counted, when a run stops, and that resuming changes none of it."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bitwise import assert_bitwise
from test_step import _batch, _one_device
from test_step import _config as _config_of_three_layers

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.training import loop, resume
from hybridnorm_jax.training.anomalies import judge, no_anomalies
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.skipped_steps import SkippedSteps
from hybridnorm_jax.training.optimizers.schedules import step_numbers
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run import Numbers
from hybridnorm_jax.training.step import StepOptions, make_train_step

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "balance_bias": True, "activation": "swiglu", "mlp_dim": 16}


pytestmark = pytest.mark.usefixtures("shared_programs")


def _config(small_config, *, model=None, **sections):
    """A step of one layer: what is skipped, and when, does not depend on the depth."""
    return _config_of_three_layers(small_config, model={"num_layers": 1} | (model or {}), **sections)


def _without_schedule(opt_state):
    schedules = [part for part in opt_state if isinstance(part, optax.ScaleByScheduleState)]
    assert len(schedules) == 1
    return [part for part in opt_state if part is not schedules[0]], int(schedules[0].count)


def _planted(batch, microbatch=-1):
    """The batch with one weight that is NaN."""
    weights = batch["weights"].copy()
    weights[microbatch, 0, 3] = np.nan
    return batch | {"weights": weights}


@pytest.mark.parametrize(
    ("model", "train", "microbatches"),
    [
        pytest.param({}, {}, 1, id="plain"),
        pytest.param({}, {"grad_accumulation": 4}, 4, id="accumulated"),
        pytest.param(EXPERTS, {}, 1, id="experts"),
        pytest.param({}, {"loss_chunk": 4}, 1, id="chunked", marks=pytest.mark.long),
    ],
)
def test_nan_in_one_place_leaves_everything_as_it_is_and_the_step_counts(model, train, microbatches, small_config):
    optimizer = {"schedule": "linear", "warmup_steps": 5}
    program = Program(_config(small_config, model=model, train=train, optimizer=optimizer), _one_device())
    state, _ = program.train_step(program.fresh_state(), _batch(microbatches))
    before = jax.device_get(state)
    state, metrics = program.train_step(state, _planted(_batch(microbatches), microbatch=microbatches // 2))
    assert not np.isfinite(metrics["loss"])
    assert [int(metrics[f"skipped_{name}"]) for name in ("steps", "nonfinite", "spikes", "in_a_row")] == [1, 1, 0, 1]
    assert_bitwise(state.params, before.params)
    kept, count = _without_schedule(state.opt_state)
    assert_bitwise(kept, _without_schedule(before.opt_state)[0])
    assert count == int(state.step) == 2
    assert_bitwise(state.anomalies.losses, before.anomalies.losses)

    # The next step is made, and equals the one without the bad step before it but for the learning rate.
    state, metrics = program.train_step(state, _batch(microbatches))
    assert np.isfinite(metrics["loss"])
    assert [int(metrics[f"skipped_{name}"]) for name in ("steps", "in_a_row")] == [1, 0]
    np.testing.assert_allclose(metrics["learning_rate"], 3e-3 * 3 / 5, rtol=1e-6)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), state.params, before.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert int(_without_schedule(state.opt_state)[1]) == 3


def test_a_gradient_that_overflows_is_skipped_though_the_loss_is_finite(small_config):
    config = _config(small_config)
    object.__setattr__(config.train, "z_loss", 1e30)  # outside the key's range: it makes the gradient overflow alone
    program = Program(config, _one_device())
    before = jax.device_get(program.fresh_state())
    state, metrics = program.train_step(program.fresh_state(), _batch())
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped_nonfinite"]) == 1
    assert_bitwise(state.params, before.params)


def _numbers(config):
    return step_numbers(config.optimizer, steps=config.train.steps, tokens_per_step=1, seed=0)


def test_an_update_that_is_not_finite_is_not_made(small_config):
    """The loss and the gradient are finite, and the update overflows."""
    config = _config(small_config)
    program = Program(config, _one_device())
    optimizer = optax.chain(optax.scale(1e38), optax.scale(1e38))
    step = make_train_step(
        program.model, lambda numbers: optimizer, StepOptions(optimizer=OptimizerSection(schedule="constant"))
    )
    fresh = program.fresh_state()
    state = dataclasses.replace(fresh, opt_state=optimizer.init(fresh.params))
    after, metrics, _ = jax.jit(step)(state, _batch(), _numbers(config))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert [int(metrics[name]) for name in ("skipped_nonfinite", "skipped_in_a_row")] == [1, 1]
    assert_bitwise(after.params, state.params)


@pytest.mark.parametrize("sigma", [None, 2.0])
def test_the_judgement_is_that_of_its_formula(sigma):
    """Against a list in Python, over a random walk with spikes, NaNs and infinities in it."""
    rng = np.random.default_rng(3)
    losses = (3 + 0.1 * rng.standard_normal(120)).astype(np.float32)
    losses[[2, 30, 31, 60, 90]] += 2
    losses[[10, 61]], losses[40] = np.nan, np.inf
    norms = np.where(np.arange(120) == 50, np.nan, 1.0).astype(np.float32)
    window, made, counts = 8, [], {"nonfinite": 0, "spikes": 0, "in_a_row": 0}
    decide = jax.jit(lambda state, loss, norm: judge(state, loss, norm, update_is_finite=jnp.array(True), sigma=sigma))
    state = no_anomalies(window)
    for loss, norm in zip(losses, norms, strict=True):
        skip, state = decide(state, loss, norm)
        bad = not (np.isfinite(loss) and np.isfinite(norm))
        last = np.array(made[-window:], np.float64)
        spike = sigma is not None and not bad and len(made) >= window and loss > last.mean() + sigma * last.std()
        assert bool(skip) == (bad or spike)
        counts["nonfinite"] += bad
        counts["spikes"] += spike
        counts["in_a_row"] = counts["in_a_row"] + 1 if bad or spike else 0
        made += [] if bad or spike else [loss]
        assert {name: int(getattr(state, name)) for name in counts} == counts
    assert int(state.made) == len(made)
    assert sorted(np.asarray(state.losses)) == sorted(made[-window:])
    assert counts["nonfinite"] == 4
    assert (counts["spikes"] >= 4) == (sigma is not None)


@pytest.mark.parametrize(("window", "skipped"), [(4, 1), (128, 0)], ids=["full", "not_full"])
def test_a_planted_spike_is_skipped_once_the_window_is_full(window, skipped, small_config):
    config = _config(small_config, train={"skip_spikes_sigma": 6.0, "spike_window": window})
    program = Program(config, _one_device())
    state = program.fresh_state()
    for _ in range(8):
        state, metrics = program.train_step(state, _batch())
    assert int(metrics["skipped_steps"]) == 0
    before = jax.device_get(state)
    spike = _batch() | {"targets": np.random.default_rng(0).integers(0, 61, _batch()["targets"].shape, np.int32)}
    state, metrics = program.train_step(state, spike)
    assert int(metrics["skipped_spikes"]) == int(metrics["skipped_steps"]) == skipped
    assert np.isfinite(metrics["loss"])
    if skipped:
        assert_bitwise(state.params, before.params)
        assert_bitwise(state.anomalies.losses, before.anomalies.losses)
    state, metrics = program.train_step(state, _batch())
    assert int(metrics["skipped_in_a_row"]) == 0


@pytest.fixture
def config(tmp_path, small_config):
    """Eight steps over random tokens, saved at every second, spikes watched."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default = RunConfig()
    return RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=str(tmp_path / "runs")),
        model=small_config(num_layers=1),
        data=dataclasses.replace(
            default.data, source="tokens", files=(str(tmp_path / "tokens.npy"),), validation_fraction=0.0
        ),
        train=TrainSection(*(8, 8, 8), log_every=3, skip_spikes_sigma=50.0, spike_window=2, max_bad_steps=3),
        checkpoint=dataclasses.replace(default.checkpoint, every=2, keep=10),
    )


def _plant(patch, steps, die_in=None):
    """NaN in the batches of these steps; a process that ends without a word in another."""
    original = Program.train_step

    def step(self, state, batch):
        number = int(state.step) + 1
        if number == die_in:
            raise _KilledError
        return original(self, state, _planted(batch) if number in steps else batch)

    patch.setattr(Program, "train_step", step)


class _KilledError(Exception):
    """Stands for SIGKILL."""


def _restored(config, tmp_path, step=None):
    with Checkpoints(tmp_path / "runs" / config.run.name / "checkpoints", keep=10) as checkpoints:
        return checkpoints.restore(Program(config).abstract_state, step)[0]


def _records(config, tmp_path):
    lines = (tmp_path / "runs" / config.run.name / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key == "step" or key.startswith("train/")}
        for line in lines
    ]


def test_bad_steps_are_recorded_and_resuming_among_them_changes_nothing(config, tmp_path, monkeypatch, capfd):
    whole = dataclasses.replace(config, run=dataclasses.replace(config.run, name="whole"))
    with monkeypatch.context() as patch:
        _plant(patch, (4, 5))
        loop.train(whole)
    assert "step 4: skipped, loss is nan and gradient norm is nan" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        _plant(patch, (4, 5), die_in=6)
        with pytest.raises(_KilledError):
            loop.train(config)
    with monkeypatch.context() as patch:
        _plant(patch, (4, 5))
        loop.train(config)  # from step 4, which was skipped
    assert_bitwise(_restored(config, tmp_path), _restored(whole, tmp_path))
    records = _records(whole, tmp_path)
    assert _records(config, tmp_path) == records
    # Every third line, the last, and those of skipped steps; besides them what is written before a save.
    records = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in records] == [3, 4, 5, 6, 8]
    assert [record["train/loss"] is None for record in records] == [False, True, True, False, False]
    assert [record["train/grad_norm"] is None for record in records] == [False, True, True, False, False]
    assert [record["train/skipped_nonfinite"] for record in records] == [0, 1, 2, 2, 2]
    assert [record["train/skipped_in_a_row"] for record in records] == [0, 1, 2, 0, 0]


def test_too_many_in_a_row_stop_the_run_which_names_a_checkpoint_from_before_them(config, tmp_path, monkeypatch):
    """Step 3 is the last that is made; if its parameters are the cause, the checkpoint of step 4 does not help."""
    _plant(monkeypatch, range(4, 9))
    message = (
        r"^step 6: loss is nan .*; 3 steps in a row were skipped \(train\.max_bad_steps\); .* is that of step 2, in "
    )
    rotated = dataclasses.replace(config, run=dataclasses.replace(config.run, name="rotated"))
    with pytest.raises(UserError, match=message):
        loop.train(dataclasses.replace(rotated, checkpoint=dataclasses.replace(config.checkpoint, every=2, keep=1)))
    assert {path.name for path in (tmp_path / "runs/rotated/checkpoints").iterdir()} == {"000002", "000004"}
    with pytest.raises(UserError, match=message):
        loop.train(config)
    state = _restored(config, tmp_path, 4)
    assert int(state.anomalies.in_a_row) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    # The last step that was made is the third: step 2's checkpoint and one more step.
    monkeypatch.undo()
    three = dataclasses.replace(config, run=dataclasses.replace(config.run, name="three"))
    with monkeypatch.context() as patch:
        _plant(patch, (), die_in=4)
        with pytest.raises(_KilledError):
            loop.train(dataclasses.replace(three, checkpoint=dataclasses.replace(config.checkpoint, every=3)))
    assert_bitwise(state.params, _restored(three, tmp_path, 3).params)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"loss": np.nan, "grad_norm": np.inf, "skipped_spikes": 2}, "loss is nan and gradient norm is inf"),
        ({"loss": 3.0, "grad_norm": 1.0, "skipped_spikes": 2}, "the parameters after its update are not finite"),
        ({"loss": 9.0, "grad_norm": 1.0, "skipped_spikes": 3}, "loss 9.0000 is a spike"),
    ],
    ids=["loss", "update", "spike"],
)
def test_a_skipped_step_says_why(metrics, reason, capsys):
    hook = SkippedSteps(most_in_a_row=10)
    state = SimpleNamespace(anomalies=no_anomalies(4).replace(spikes=jnp.array(2)))
    run = SimpleNamespace(state=state, named="")
    hook.start(run)
    hook.on_numbers(
        run, Numbers(7, {name: np.asarray(each) for name, each in (metrics | {"skipped_in_a_row": 1}).items()})
    )
    assert capsys.readouterr().err == f"step 7: skipped, {reason}\n"


class _OldState(NamedTuple):
    """TrainState before it knew of skipped steps."""

    step: Any
    params: Any
    opt_state: Any


def test_a_checkpoint_of_a_version_that_skipped_no_steps_restores(config, tmp_path):
    program = Program(config)
    state = program.fresh_state()
    old = _OldState(state.step, state.params, state.opt_state)
    with Checkpoints(tmp_path / "old", keep=1) as checkpoints:
        checkpoints.save(5, old, data_state={"iterator": 5}, config_yaml="", wait=True)
        state, data_state = resume.restore(program, checkpoints, 5)
    assert data_state == {"iterator": 5}
    assert_bitwise(state, program.fresh_state())
    assert_bitwise(
        jax.tree.map(lambda leaf: leaf.shape, state), jax.tree.map(lambda leaf: leaf.shape, program.abstract_state)
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_bad_steps", 0),
        ("skip_spikes_sigma", 0.0),
        ("spike_window", 1),
        ("stall_seconds", 0.0),
        ("stall_exit", True),
    ],
)
def test_wrong_values_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=rf"^train\.{key}="):
        TrainSection(**{key: value})
