"""optimizer.ema_decay: what the average is, what it leaves as it was, and that it comes back bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_bitwise
from test_step import _batch
from test_step import _config as _config_of_three_layers

import hybridnorm_jax as hn
from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.config.run_config import MeshSection
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.parameter_average import Average, begun_average, step_weight, with_parameters
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.resume import restore

DECAY = 0.8

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.99999])
@pytest.mark.parametrize("count", [1, 2, 1000, 3_000_000])
def test_the_weight_of_a_step_keeps_its_digits(decay, count):
    """About six roundings of 2^-24 each, and none of them is of a difference of nearly equal numbers."""
    expected = (1 - decay) / -np.expm1(count * np.log(np.float64(decay)))
    np.testing.assert_allclose(float(step_weight(jnp.int32(count), decay=decay)), expected, rtol=6 * 2**-24)


def test_parameters_that_stay_are_their_own_average():
    """w new + (1 - w) old, as optax.incremental_update computes it, would be off by 3e-4 after these steps."""
    params = {"kernel": jnp.linspace(-1, 1, 7, dtype=jnp.float32)}
    start = Average(jnp.int32(100_000), params)
    after = jax.lax.fori_loop(0, 30_000, lambda _, average: with_parameters(average, params, decay=0.9999), start)
    np.testing.assert_array_equal(after.params["kernel"], params["kernel"])


def _weighted_mean(parameters):
    """In float64, by the sums of the definition."""
    weights = DECAY ** np.arange(len(parameters))[::-1].astype(np.float64)

    def mean(*leaves):
        return sum(weight * np.asarray(leaf, np.float64) for weight, leaf in zip(weights, leaves, strict=True))

    return jax.tree.map(lambda *leaves: mean(*leaves) / weights.sum(), *parameters)


def _config(small_config, **sections):
    optimizer = {"ema_decay": DECAY} | sections.pop("optimizer", {})
    return _config_of_three_layers(
        small_config, model={"num_layers": 1, "tie_embeddings": True}, optimizer=optimizer, **sections
    )


def test_the_average_is_that_of_the_steps_that_were_made_on_eight_devices(small_config):
    """Sharded as the parameters are; a step that is skipped for a NaN is no part of it."""
    program = Program(_config(small_config, mesh=MeshSection(data=2, fsdp=2, tensor=2)))
    state = program.fresh_state()
    jax.tree.map(np.testing.assert_array_equal, state.average.params, state.params)
    parameters = []
    for number in range(5):
        batch = _batch(seed=number)
        if number == 2:
            batch["weights"][0, 0, 0] = np.nan
        before = jax.device_get(state.average)
        state, metrics = program.train_step(state, batch)
        if number == 2:
            assert int(metrics["skipped_in_a_row"]) == 1
            jax.tree.map(np.testing.assert_array_equal, state.average, before)
        else:
            parameters.append(jax.device_get(state.params))
    assert int(state.average.count) == 4

    def compare(ours, expected, plain):
        assert ours.dtype == np.float32
        assert ours.sharding == plain.sharding
        # A few roundings of the largest number in it, and the parameters have moved by far more.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=8 * 2**-24 * scale)
        assert np.abs(expected - plain).max() > 1e-4

    jax.tree.map(compare, state.average.params, _weighted_mean(parameters), state.params)


def test_without_a_decay_there_is_nothing_of_it(small_config, tmp_path):
    program = Program(_config(small_config, optimizer={"ema_decay": None}), _mesh_of_one())
    state = program.fresh_state()
    assert state.average is None
    assert state.params_in_use is state.params
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, data_state={}, config_yaml="", wait=True)
        assert checkpoints.fields(1) == {"step", "params", "opt_state", "anomalies"}
        assert "average" not in (tmp_path / "000001/state/_METADATA").read_text()
        assert not checkpoints.has_average(1)


def test_an_average_in_float64_has_its_digits():
    with jax.enable_x64(True):
        before = begun_average({"bias": jnp.zeros((3,), jnp.float64)})
        after = with_parameters(before, {"bias": jnp.ones((3,), jnp.float64)}, decay=DECAY)
        after = with_parameters(after, {"bias": jnp.full((3,), 2.0, jnp.float64)}, decay=DECAY)
        np.testing.assert_allclose(after.params["bias"], (DECAY + 2) / (1 + DECAY), rtol=1e-15)


def _mesh_of_one():
    return hn.make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture
def config(small_config, tmp_path):
    """A run of four steps on token files, saved and scored after every second."""
    rng = np.random.default_rng(0)
    for name in ("tokens", "held"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 61, 3000).astype(np.uint16))
    config = _config(small_config, train={"steps": 4, "log_every": 1}, mesh=MeshSection(data=2, fsdp=2, tensor=2))
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name="first", dir=str(tmp_path / "runs")),
        data=dataclasses.replace(
            config.data,
            source="tokens",
            files=(str(tmp_path / "tokens.npy"),),
            validation={"held": (str(tmp_path / "held.npy"),)},
            validation_fraction=0,
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every=2, keep=10),
        eval=dataclasses.replace(config.eval, every=2, batches=1, plain=True),
    )


def _with(config, **sections):
    """The configuration with other keys, such as run={"name": ...}."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **keys) if isinstance(keys, dict) else keys
        for name, keys in sections.items()
    }
    return dataclasses.replace(config, **changed)


def _state(config, step):
    with Checkpoints(f"{config.run.dir}/{config.run.name}/checkpoints", keep=10) as checkpoints:
        return restore(Program(config), checkpoints, step)[0]


class _KilledError(Exception):
    """Stands for a process that ends without a word."""


def test_a_run_that_was_killed_has_the_same_average_and_says_what_it_scored(config, monkeypatch, capsys):
    whole = _with(config, run={"name": "whole"})
    scores = loop.train(whole)
    step, made = Program.train_step, []

    def dies(self, state, batch):
        made.append(1)
        if len(made) == 4:
            raise _KilledError
        return step(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "train_step", dies)
        with pytest.raises(_KilledError):
            loop.train(config)
    loop.train(config)
    assert_bitwise(_state(config, 4), _state(whole, 4))

    directory = f"{whole.run.dir}/whole"
    last = [record for record in read_records(directory) if "eval/held/loss" in record][-1]
    assert last["eval/ema_decay"] == DECAY
    averaged, plain = evaluate_run(directory, progress=False), evaluate_run(directory, progress=False, plain=True)
    assert (averaged.which.name, plain.which.name) == ("averaged", "plain")
    assert last["eval/held/loss"] == scores["held"].loss
    # Other batch sizes and devices sum in another order.
    assert averaged.scores["held"].loss == pytest.approx(last["eval/held/loss"], rel=1e-5)
    assert plain.scores["held"].loss == pytest.approx(last["eval_plain/held/loss"], rel=1e-5)
    assert abs(last["eval/held/loss"] - last["eval_plain/held/loss"]) > 1e-3
    said = capsys.readouterr().out
    assert "Evaluation of the averaged parameters after step 4" in said
    assert "The same of the parameters that are not averaged" in said

    with pytest.raises(ConfigError, match=r"optimizer\.ema_decay: saved 0\.8, asked null"):
        loop.train(_with(whole, optimizer={"ema_decay": None}, eval={"plain": False}))
    _, params = hn.load_run(directory)
    _, plain_params = hn.load_run(directory, plain=True)
    state = _state(whole, 4)
    assert_bitwise(params, state.average.params)
    assert_bitwise(plain_params, state.params)


def test_who_begins_with_such_a_run_takes_the_average_and_a_branch_takes_both(config, monkeypatch):
    loop.train(config)
    ended = _state(config, 4)
    begun = {}

    def remember(self, state, batch):
        begun[self.config.run.name] = jax.device_get(state)
        raise _KilledError

    monkeypatch.setattr(Program, "train_step", remember)
    first = f"{config.run.dir}/first"
    without = {"optimizer": {"ema_decay": None}, "eval": {"plain": False}}
    heirs = {
        "averaged": {"init_from": first},
        "plain": {"init_from": first, "init_plain": True},
        "plain_without": {"init_from": first, "init_plain": True, **without},
        "branch": {"init_from": f"{first}@4", "init_optimizer": True, "train": {"steps": 6}},
        "branch_without": {"init_from": f"{first}@4", "init_optimizer": True, "train": {"steps": 6}, **without},
    }
    for name, keys in heirs.items():
        with pytest.raises(_KilledError):
            loop.train(_with(config, run={"name": name}, **keys))
    for name in ("averaged", "plain"):
        expected = ended.average.params if name == "averaged" else ended.params
        assert_bitwise(begun[name].params, expected)
        assert_bitwise(begun[name].average, Average(np.int32(0), expected))
    assert_bitwise(begun["plain_without"].params, ended.params)
    assert_bitwise(begun["branch"], ended)
    assert_bitwise(begun["branch_without"], dataclasses.replace(ended, average=None))


@pytest.mark.long  # another program is compiled
def test_a_branch_of_a_run_without_an_average_begins_one(config, monkeypatch):
    plain = _with(config, optimizer={"ema_decay": None}, eval={"plain": False})
    loop.train(plain)
    with pytest.raises(ConfigError, match=r"optimizer\.ema_decay: saved null, asked 0\.8"):
        loop.train(config)
    branch = _with(
        config, run={"name": "branch"}, train={"steps": 5}, init_from=f"{plain.run.dir}/first@4", init_optimizer=True
    )
    loop.train(branch)
    state = _state(branch, 5)
    assert int(state.average.count) == 1
    # After one step the average is what that step led to, up to the rounding of old + 1 * (new - old).
    jax.tree.map(lambda a, p: np.testing.assert_allclose(a, p, rtol=0, atol=1e-7), state.average.params, state.params)
