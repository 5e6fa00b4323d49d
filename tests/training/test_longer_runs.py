"""Runs that go on further than planned, branches of other runs, and what neither may be mixed with."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from bitwise import assert_bitwise

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.program import Program

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def config(tmp_path, small_config):
    """Four steps over two shards of one size."""
    for number in range(2):
        ids = np.random.default_rng(number).integers(0, 61, 400)
        np.save(tmp_path / f"shard_{number}.npy", ids.astype(np.uint16))
    default = RunConfig()
    return RunConfig(
        run=dataclasses.replace(default.run, name="trunk", dir=str(tmp_path / "runs")),
        model=small_config(scheme="pre", num_layers=1),
        data=dataclasses.replace(
            default.data, source="tokens", files=(str(tmp_path / "shard_*.npy"),), validation_fraction=0
        ),
        train=dataclasses.replace(default.train, steps=4, batch_size=4, seq_len=16, log_every=1),
        optimizer=dataclasses.replace(default.optimizer, schedule="constant"),
        checkpoint=dataclasses.replace(default.checkpoint, every=2, keep=10),
        mesh=dataclasses.replace(default.mesh, data=2, tensor=4),
    )


def _with(config, *, name=None, steps=None, **top):
    """The configuration with some keys of `run`, `train` and the top level changed."""
    run = config.run if name is None else dataclasses.replace(config.run, name=name)
    train = config.train if steps is None else dataclasses.replace(config.train, steps=steps)
    return dataclasses.replace(config, run=run, train=train, **top)


def _state(config, step):
    directory = f"{config.run.dir}/{config.run.name}/checkpoints"
    with Checkpoints(directory, keep=10) as checkpoints:
        return checkpoints.restore(Program(config).abstract_state, step)


def _adam(state):
    (found,) = [part for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(part)]
    return found


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.long
def test_a_finished_run_of_a_constant_rate_goes_on_as_if_it_had_been_longer(config):
    loop.train(config)
    longer = _with(config, steps=8)
    loop.train(longer)
    straight = _with(config, name="straight", steps=8)
    loop.train(straight)
    assert_bitwise(_state(longer, 8), _state(straight, 8))


def test_a_schedule_that_depends_on_the_number_of_steps_says_so(config):
    cosine = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="cosine"))
    loop.train(cosine)
    with pytest.raises(ConfigError, match=r"train\.steps: saved 4, asked 8, but optimizer\.schedule=cosine has set"):
        loop.train(_with(cosine, steps=8))


def test_a_branch_goes_on_with_moments_step_and_place_in_the_data(config, monkeypatch):
    loop.train(config)
    decay = dataclasses.replace(config.optimizer, schedule="wsd", wsd_decay_fraction=0.5)
    source = f"{config.run.dir}/trunk@2"
    branch = _with(config, name="branch", init_from=source, init_optimizer=True, optimizer=decay)
    seen = []
    step = Program.train_step

    def noted(self, state, batch):
        seen.append((int(state.step), int(_adam(state).count), np.asarray(batch["tokens"])))
        return step(self, state, batch)

    monkeypatch.setattr(Program, "train_step", noted)
    loop.train(branch)
    loop.train(_with(config, name="straight"))
    assert [(number, count) for number, count, _ in seen] == [(2, 2), (3, 3), (0, 0), (1, 1), (2, 2), (3, 3)]
    np.testing.assert_array_equal(seen[0][2], seen[4][2])
    np.testing.assert_array_equal(seen[1][2], seen[5][2])
    # Of four steps the last two decay: the branch has made its third step with another rate than the trunk.
    trunk, other = _state(config, 4)[0], _state(branch, 4)[0]
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (trunk, other)), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 2}, r"train\.steps=2: .*trunk@2 has made 2 steps already"),
        ({"batch_size": 8}, r"init_optimizer=true: a branch of .*trunk@2 needs the same train\.batch_size: saved 4"),
    ],
    ids=["no step left", "other rows"],
)
def test_a_branch_that_cannot_be_names_the_key(config, change, message):
    loop.train(config)
    train = dataclasses.replace(config.train, **change)
    branch = _with(config, name="branch", init_from=f"{config.run.dir}/trunk@2", init_optimizer=True)
    with pytest.raises(ConfigError, match=message):
        loop.train(dataclasses.replace(branch, train=train))


def test_parameters_of_another_placement_are_refused_though_their_shapes_are_equal(config):
    loop.train(config)
    model = dataclasses.replace(config.model, rope_theta=500.0)
    heir = _with(config, name="heir", model=model, init_from=f"{config.run.dir}/trunk")
    with pytest.raises(ConfigError, match=r"trunk: its parameters belong to another model \(model\.rope_theta"):
        loop.train(heir)


def test_exchanged_shards_of_one_size_are_not_the_data_of_before(config, tmp_path):
    loop.train(_with(config, steps=2))
    first, second = (tmp_path / f"shard_{number}.npy" for number in range(2))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    with pytest.raises(ConfigError, match=r"data\.files: shard_0\.npy has another content than it had when step 2"):
        loop.train(config)
    first.write_bytes(content[0])
    second.write_bytes(content[1])
    loop.train(config)


def test_data_that_have_moved_are_the_same_data_and_others_are_not(config, tmp_path):
    loop.train(_with(config, steps=2))
    (tmp_path / "moved").mkdir()
    for number in range(2):
        (tmp_path / f"shard_{number}.npy").rename(tmp_path / f"moved/shard_{number}.npy")
    moved = dataclasses.replace(config.data, files=(str(tmp_path / "moved/shard_*.npy"),))
    loop.train(_with(config, data=moved))
    # A branch starts from data that have moved, too.
    loop.train(
        _with(config, name="branch", steps=6, init_from=f"{config.run.dir}/trunk@2", init_optimizer=True, data=moved)
    )
    one = dataclasses.replace(moved, files=(str(tmp_path / "moved/shard_0.npy"),))
    with pytest.raises(ConfigError, match=r"data\.files: shard_1\.npy is not read now, but was when step 4 was"):
        loop.train(_with(config, steps=8, data=one))


def test_data_without_digests_are_known_by_their_place(config, tmp_path, monkeypatch):
    """As a version wrote checkpoints that kept no identities of data."""
    save = Checkpoints.save

    def without_files(self, step, state, *, data_state, **keywords):
        data_state = {name: value for name, value in data_state.items() if name != "files"}
        return save(self, step, state, data_state=data_state, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", without_files)
        loop.train(_with(config, steps=2))
    (tmp_path / "moved").mkdir()
    for number in range(2):
        (tmp_path / f"shard_{number}.npy").rename(tmp_path / f"moved/shard_{number}.npy")
    moved = dataclasses.replace(config.data, files=(str(tmp_path / "moved/shard_*.npy"),))
    with pytest.raises(ConfigError, match=r"data\.files: saved \[.*\], asked \[.*moved.*holds no digests of data"):
        loop.train(_with(config, data=moved))
