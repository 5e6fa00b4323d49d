"""A run whose newest checkpoint is damaged stops, or goes on before it if allowed; one that cannot save stops soon."""

import contextlib
import dataclasses
import errno
import os
import shutil

import numpy as np
import pytest
from document_runs import training_losses
from test_checkpoints import assert_same
from test_manifest import flip

from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_directory import load_run
from hybridnorm_jax.training.step_directories import CheckpointError

STEPS = 6


pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def config(tmp_path, small_config):
    """Six steps over random tokens, saved at every second."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default = RunConfig()
    validation = {"train_same": (str(tmp_path / "tokens.npy"),)}
    files, runs = (str(tmp_path / "tokens.npy"),), str(tmp_path / "runs")
    return RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=runs),
        model=small_config(scheme="pre", num_layers=1, dropout=0.1),
        data=dataclasses.replace(
            default.data, source="tokens", files=files, validation=validation, validation_fraction=0.0
        ),
        train=dataclasses.replace(default.train, steps=STEPS, batch_size=8, seq_len=8, log_every=1),
        checkpoint=dataclasses.replace(default.checkpoint, every=2, keep=10),
        eval=dataclasses.replace(default.eval, every=4, batches=1),
    )


def _with_fallback(config, **changes):
    allowed = dataclasses.replace(config.checkpoint, allow_fallback=True)
    return dataclasses.replace(config, checkpoint=allowed, **changes)


def _restored(config, directory):
    with Checkpoints(directory / "checkpoints", keep=10) as checkpoints:
        return checkpoints.restore(Program(config).abstract_state)


@pytest.mark.long
def test_a_run_goes_on_before_the_damage_if_allowed_and_ends_as_if_there_had_been_none(config, tmp_path, capfd):
    run, whole = tmp_path / "runs/run", tmp_path / "runs/whole"
    loop.train(config)
    shutil.copytree(run, whole)
    file = max((path for path in (run / "checkpoints/000006").rglob("*")), key=lambda path: path.stat().st_size)
    flip(file, 8 * (file.stat().st_size // 2))
    before = (run / "metrics.jsonl").read_text()
    line = rf"^{file}: its digest is not the manifest's: damaged; checkpoint\.allow_fallback=true uses the one before"

    with pytest.raises(CheckpointError, match=line):
        loop.train(config)
    assert (run / "metrics.jsonl").read_text() == before
    # eval.py, load_run and init_from: the same, and never another one than the one that was named.
    heir = dataclasses.replace(config, run=dataclasses.replace(config.run, name="heir"), init_from=str(run))
    for use in (lambda: evaluate_run(str(run)), lambda: load_run(str(run)), lambda: loop.train(heir)):
        with pytest.raises(CheckpointError, match=line):
            use()
    with pytest.raises(CheckpointError, match="its digest is not the manifest's"):
        evaluate_run(str(run / "checkpoints/000006"), ["checkpoint.allow_fallback=true"])
    assert evaluate_run(str(run), ["checkpoint.allow_fallback=true"], progress=False).step == 4
    assert_same(load_run(str(run), allow_fallback=True)[1], load_run(str(run / "checkpoints/000004"))[1])
    program = Program(heir)
    data = loop.open_data(heir.data, seq_len=8, vocab_size=61)
    with Checkpoints(tmp_path / "runs/heir/checkpoints", keep=1) as none:
        start = loop.beginning(_with_fallback(heir), program, data, none, None)
    assert start.step == 0
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        assert_same(start.state.params, checkpoints.restore_params(program.abstract_state.params, 4))

    capfd.readouterr()
    loop.train(_with_fallback(config))
    assert capfd.readouterr().err.count(": damaged; passed over, and kept as 000006.damaged") == 1
    ours, expected = _restored(config, run), _restored(config, whole)
    assert_same(ours[0], expected[0])
    assert ours[1] == expected[1]
    assert training_losses(run) == training_losses(whole)
    assert [step for step, _ in training_losses(run)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("000002", "000004", "000006", "000006.damaged")
    ]


def test_a_failed_save_stops_the_run_at_the_next_step(config, tmp_path, monkeypatch):
    rename, train_step, save_method = os.rename, Program.train_step, Checkpoints.save
    saves, steps = [], []

    def fail(source, target):
        if "000002.orbax-checkpoint-tmp" in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    def record(self, step, *args, **keys):
        saves.append((step, self))
        save_method(self, step, *args, **keys)

    def step(self, *args):
        steps.append(len(steps) + 1)
        if steps[-1] == 3:  # the first after the save that fails
            with contextlib.suppress(CheckpointError):
                saves[0][1]._running.result(60)
        return train_step(self, *args)

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(Checkpoints, "save", record)
    monkeypatch.setattr(Program, "train_step", step)
    directory = tmp_path / "runs/run/checkpoints"
    message = f"^{directory}: saving step 2 failed: no space left on device; complete steps, unharmed: none$"
    with pytest.raises(CheckpointError, match=message):
        loop.train(config)
    assert [step for step, _ in saves] == [2]
    assert steps == [1, 2, 3]
