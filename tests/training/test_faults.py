"""Runs that are killed, or told to stop, at any moment: the same command ends them as if nothing had been."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from bitwise import assert_bitwise
from covering import others_are_long
from document_runs import renamed
from faults.harness import MOMENTS, Harness

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import exit_status
from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import INTERRUPTED, REQUEUE, RunStopped
from hybridnorm_jax.training import loop, stopping
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.stopping import StopSignals

STEPS = 6


@pytest.mark.long
def test_a_run_killed_five_times_ends_as_the_undisturbed_one(tmp_path):
    """Processes of their own, at random moments of every kind; then one that is told to stop."""
    harness = Harness(tmp_path, random.Random(7))
    harness.prepare()
    met = harness.disturb("killed", [signal.SIGKILL] * 4 + [signal.SIGTERM], [*MOMENTS, "step"])
    assert met >= 4


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    harness = Harness(tmp_path, random.Random(8))
    harness.prepare()
    kills = 0
    for run in range(100):  # some signals come after the end of their run
        signals = harness.random.choices([signal.SIGKILL, signal.SIGTERM], k=4)
        kills += harness.disturb(f"run{run}", signals, list(MOMENTS))
        if kills >= 100:
            break
    assert kills >= 100


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Six steps over random tokens; saved at every second, evaluated at every third."""
    directory = tmp_path_factory.mktemp("stopped")
    np.save(directory / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default, files = RunConfig(), (str(directory / "tokens.npy"),)
    return RunConfig(
        run=dataclasses.replace(default.run, name="whole", dir=str(directory / "runs")),
        model=hn.ModelConfig(d_model=16, num_layers=1, num_heads=2, mlp_dim=16, vocab_size=61, dropout=0.1),
        data=dataclasses.replace(
            default.data, source="tokens", files=files, validation={"train_same": files}, validation_fraction=0.0
        ),
        train=TrainSection(STEPS, 8, 8, log_every=1),
        checkpoint=dataclasses.replace(default.checkpoint, every=2, keep=10),
        eval=dataclasses.replace(default.eval, every=3, batches=2),
    )


@pytest.fixture(scope="module")
def whole(config):
    """The undisturbed run: (final state, records)."""
    loop.train(config)
    return _restored(config), _records(config)


def _restored(config):
    with Checkpoints(Path(config.run.dir) / config.run.name / "checkpoints", keep=10) as checkpoints:
        return jax.device_get(checkpoints.restore(Program(config).abstract_state)[0])


def _records(config):
    records = read_records(Path(config.run.dir) / config.run.name)
    timed = ("tokens_per_second", "mfu", "time/")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in records]


def _signal_in(patch, owner, name, call, number=signal.SIGTERM):
    """This process gets the signal in the `call`-th call of owner.name, before it does anything."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **keys):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **keys)

    patch.setattr(owner, name, wrapped)


# What is called when the signal comes, the how-manieth call, and the step that is saved.
MOMENTS_IN_PROCESS = {
    "compilation": (Program, "train_step", 1, 1),
    "step": (Program, "train_step", 4, 4),
    "save": (Checkpoints, "save", 1, 2),
    "evaluation": (Program, "eval_step", 1, 3),
    "the last step": (Program, "train_step", STEPS, STEPS),
    "the last evaluation": (Program, "eval_step", 3, STEPS),
    "data preparation": (loop, "open_data", 1, None),
    "restoring": (loop, "beginning", 1, None),
}
AT_THE_END = {"the last step", "the last evaluation"}


@pytest.mark.usefixtures("shared_programs")
# At the end nothing else is called than before, only later.
@pytest.mark.parametrize("moment", others_are_long(MOMENTS_IN_PROCESS, [*MOMENTS_IN_PROCESS.keys() - AT_THE_END]))
def test_told_to_stop_and_resumed_equals_undisturbed_bit_for_bit(moment, config, whole, monkeypatch, capfd):
    owner, name, call, saved = MOMENTS_IN_PROCESS[moment]
    stopped = renamed(config, moment)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        _signal_in(patch, owner, name, call)
        status = exit_status(lambda: loop.train(stopped))
    assert status == REQUEUE == 75
    assert signal.getsignal(signal.SIGTERM) is before
    outcome = "no step was made, nothing was to be saved" if saved is None else f"step {saved} is saved"
    line = f"stopped by SIGTERM or a preemption notice: {outcome}; the same command goes on"
    assert line in capfd.readouterr().err.splitlines()
    checkpoints = Path(config.run.dir) / moment / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir()) if checkpoints.exists() else []
    assert steps == ([] if saved is None else sorted({*range(2, saved + 1, 2), saved}))

    loop.train(stopped)
    state, records = whole
    assert_bitwise(_restored(stopped), state)
    assert _records(stopped) == records


@pytest.fixture
def _heeds_ctrl_c():
    """A shell starts what it runs in the background with this signal ignored, and training then ignores it, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c", "shared_programs")
def test_ctrl_c_saves_as_well_and_has_its_own_status(config, monkeypatch, capfd):
    stopped = renamed(config, "ctrl_c")
    with monkeypatch.context() as patch:
        _signal_in(patch, Program, "train_step", 3, signal.SIGINT)
        assert exit_status(lambda: loop.train(stopped)) == INTERRUPTED == 130
    assert "stopped by SIGINT: step 3 is saved" in capfd.readouterr().err


def test_a_second_signal_ends_at_once(monkeypatch):
    sent = []
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(stopping.os, "kill", lambda *words: sent.append(words))
        signals._receive(signal.SIGTERM, None)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(RunStopped):
            signals.poll()
        with pytest.raises(RunStopped), signals.interruptible():
            pytest.fail("a signal that came before must be seen")


def test_another_thread_changes_no_handler(capfd):
    before = signal.getsignal(signal.SIGTERM)

    def elsewhere():
        with StopSignals() as signals:
            assert signal.getsignal(signal.SIGTERM) is before
            signals.poll()
        print("done")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "done" in capfd.readouterr().out


def test_what_processes_tell_each_other_comes_one_call_late():
    exchange = stopping._Exchange()
    assert [exchange.swap(number) for number in (0, 75, 0, 0)] == [0, 0, 75, 0]
    assert stopping._Exchange().swap(130) == 130  # what came before the first step is known before it


def test_a_preemption_notice_stops_as_sigterm_does(monkeypatch):
    numbers = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        stopping.multihost_utils, "reached_preemption_sync_point", lambda n: numbers.append(n) or n == 3
    )
    with StopSignals() as signals:
        signals.poll()
        signals.poll()
        with pytest.raises(RunStopped) as caught:
            signals.poll()
    assert caught.value.exit_code == REQUEUE
    assert numbers == [1, 2, 3]


@pytest.mark.long
def test_one_process_of_two_is_told_to_stop_and_both_save_the_same_step(tmp_path):
    harness = Harness(tmp_path, random.Random(0))
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 20_000).astype(np.uint16))
    # Long enough for the signal to come before its end.
    words = [*harness.words("two"), "train.steps=2000", "checkpoint.every=1000", "eval.every=1000"]
    command = [sys.executable, str(processes.REPOSITORY / "train.py"), *words]
    port, environment = processes.free_port(), processes.environment(devices=2)
    pair = [
        subprocess.Popen(
            [*command, *processes.together(port, 2, number)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while len(harness._records("two")) < 5:
            assert time.monotonic() < deadline
            assert [process.poll() for process in pair] == [None, None], [p.stderr.read() for p in pair if p.poll()]
            time.sleep(0.01)
        pair[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert [process.returncode for process in pair] == [REQUEUE, REQUEUE], errors
    (step,) = [int(path.name) for path in (tmp_path / "runs/two/checkpoints").iterdir()]
    assert f"stopped by SIGTERM or a preemption notice: step {step} is saved; the same command goes on" in errors[0]
    assert harness._records("two")[-1]["step"] == step
    assert step >= 5
