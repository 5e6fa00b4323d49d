"""Where time goes: the ledger's sums, single steps, and a run that hangs."""

import dataclasses
import json
import os
import time

import jax
import numpy as np
import pytest
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.training import loop, watchdog
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.step_clock import StepClock
from hybridnorm_jax.training.throughput import tokens_per_second
from hybridnorm_jax.training.time_ledger import TimeLedger, process_began
from hybridnorm_jax.training.time_metrics import memory_in_use
from hybridnorm_jax.training.watchdog import Watchdog


class _Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_the_phases_add_up_to_the_time_that_passed():
    clock = _Clock()
    ledger = TimeLedger(began=90.0, now=clock)
    clock.seconds += 2
    ledger.enter("input")
    clock.seconds += 1
    assert ledger.enter("steps") == 1
    clock.seconds += 5
    with ledger.phase("checkpoint"):
        clock.seconds += 3
        with ledger.phase("other"):
            clock.seconds += 0.5
        assert ledger.current[0] == "checkpoint"
    clock.seconds += 7.5
    expected = {"start-up": 12, "input": 1, "steps": 12.5, "checkpoint": 3, "other": 0.5}
    assert {name: spent for name, spent in ledger.seconds().items() if spent} == expected
    assert ledger.goodput() == pytest.approx(12.5 / 29)
    ledger.move(2.5, "steps", "skipped")
    assert ledger.goodput() == pytest.approx(10 / 29)
    assert sum(ledger.seconds().values()) == clock.seconds - 90
    lines = ledger.table().splitlines()
    assert lines[0] == "Time of this process: 29 s, of which 34.5 % in training steps (goodput)"
    assert [line.split()[0] for line in lines[1:]] == ["start-up", "steps", "input", "checkpoint", "skipped", "other"]


def test_a_step_counts_where_it_only_trained():
    now, compiled = _Clock(), _Clock()
    clock = StepClock(now, compilations=compiled)

    def pass_step(step, seconds, **keys):
        now.seconds += seconds
        return clock.tick(step, **keys)

    assert pass_step(1, 90) is None  # nothing says when it began
    assert set(clock.percentiles().values()) == {None}
    for step, seconds in ((2, 1), (3, 2), (4, 3)):
        assert pass_step(step, seconds) == seconds
    assert clock.percentiles() == {"time/step_p50": 2, "time/step_p90": pytest.approx(2.8), "time/step_max": 3}
    compiled.seconds += 1
    assert pass_step(5, 70) == 70
    assert pass_step(6, 5, was_skipped=True) == 5
    clock.leave_out(8)
    pass_step(7, 4)
    pass_step(8, 60)
    now.seconds += 50  # something else, which compiles as well
    compiled.seconds += 1
    clock.restart()
    pass_step(9, 5, at_once=True)
    pass_step(10, 0.1, at_once=True)  # its batch was waited for in step 9's time
    assert clock.line == [1, 2, 3, 4, 5] == list(clock.process)
    clock.begin_line()
    assert clock.line == []
    pass_step(11, 6)
    assert clock.line == [6]  # no time is lost between lines
    assert list(clock.process) == [1, 2, 3, 4, 5, 6]


def test_the_default_clock_sees_that_something_is_compiled():
    clock = StepClock()
    clock.tick(1)
    jax.jit(lambda x: x + 7)(np.arange(5))
    clock.tick(2)
    assert clock.line == []
    clock.tick(3)
    assert len(clock.line) == 1


def test_throughput_is_that_of_the_median_step():
    assert tokens_per_second([2.0, 1.0, 2.0, 90.0, 2.0], 100) == 50
    assert tokens_per_second([4.0, 4.0, 4.0], 100) == 25  # what slows all steps down is not hidden
    assert tokens_per_second([], 100) is None


@pytest.mark.long
def test_other_work_leaves_the_throughput_alone(config, tmp_path, monkeypatch):
    """Now and then something takes 0.4 s more, a hundred times what a step of this model takes."""

    def slow_down(owner, method):
        original = getattr(owner, method)

        def slow(*arguments, **keys):
            time.sleep(0.4)
            return original(*arguments, **keys)

        monkeypatch.setattr(owner, method, slow)

    slow_down(Program, "watch")
    slow_down(Program, "eval_step")
    slow_down(Checkpoints, "save")
    run_with(config, ["train.watch_every=3", "eval.every=4", "checkpoint.every=4"])
    rates = {record["step"]: record["tokens_per_second"] for record in step_lines(tmp_path)}
    # Layers are watched in steps 1, 3 and 6.
    assert [step for step, rate in rates.items() if rate is not None] == [2, 4, 5]
    assert min(rate for rate in rates.values() if rate is not None) > 8 * 8 / 0.4


@pytest.mark.long  # the median of the steps is tested above
def test_what_slows_every_step_down_shows(config, tmp_path, monkeypatch):
    original = loop._next_batch

    def slow(run):
        time.sleep(0.2)
        return original(run)

    monkeypatch.setattr(loop, "_next_batch", slow)
    run_with(config, [])
    records = step_lines(tmp_path)
    # Step 1 compiles. The results of steps 3 and 6 are read before the next batch is waited for.
    assert [record["step"] for record in records if record["tokens_per_second"] is not None] == [2, 4, 5]
    for record in records:
        if record["tokens_per_second"] is None:
            continue
        assert record["tokens_per_second"] < 8 * 8 / 0.2
        expected = tokens_per_second(record["time/step_seconds"], 8 * 8)
        assert record["tokens_per_second"] == pytest.approx(expected, rel=1e-3)


def run_with(config, settings):
    """Six steps, each with a line of its own."""
    base = from_yaml(to_yaml(config), ["train.log_every=1", "train.stall_seconds=null", *settings])
    loop.train(base)


def step_lines(tmp_path):
    records = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


def test_memory_is_that_of_the_fullest_device():
    assert set(memory_in_use(jax.local_devices()).values()) == {None}  # a CPU tells nothing

    @dataclasses.dataclass
    class Device:
        stats: dict | None

        def memory_stats(self):
            return self.stats

    devices = [Device({"bytes_in_use": 5, "peak_bytes_in_use": 9}), Device({"bytes_in_use": 7}), Device(None)]
    assert memory_in_use(devices) == {"time/hbm_in_use": 7, "time/hbm_peak": 9}


@pytest.mark.skipif(not os.path.exists("/proc/uptime"), reason="only Linux tells when a process began")
def test_when_the_process_began():
    age = time.perf_counter() - process_began()
    assert 0 < age < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert age >= time.process_time() / os.cpu_count() - 0.1


@pytest.fixture
def config(tmp_path, small_config):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default = RunConfig()
    files = (str(tmp_path / "tokens.npy"),)
    return RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=str(tmp_path / "runs")),
        model=small_config(scheme="pre", num_layers=1),
        data=dataclasses.replace(
            default.data, source="tokens", files=files, validation={"train_same": files}, validation_fraction=0.0
        ),
        train=TrainSection(6, 8, 8, log_every=2, stall_seconds=0.5),
        checkpoint=dataclasses.replace(default.checkpoint, every=3),
        eval=dataclasses.replace(default.eval, every=3, batches=2),
    )


def test_a_run_accounts_for_its_time_and_names_the_wait_that_is_stuck(config, tmp_path, monkeypatch, capfd):
    """Two stalls of 1.5 seconds: the sixth batch, then the second evaluation's second batch."""
    next_batch, eval_step, hung = loop._next_batch, Program.eval_step, []

    class Slow:
        def __init__(self, iterator):
            self.iterator, self.get_state = iterator, iterator.get_state

        def __next__(self):
            hung.append("input")
            time.sleep(1.5)
            return next(self.iterator)

    def slow_input(run):
        iterator = run.iterator
        run.iterator = Slow(iterator) if run.step == 5 else iterator
        try:
            return next_batch(run)
        finally:
            run.iterator = iterator

    def slow_evaluation(self, params, batch, *, step):
        hung.append("evaluation")
        if hung.count("evaluation") == 4:
            time.sleep(1.5)
        return eval_step(self, params, batch, step=step)

    monkeypatch.setattr(loop, "_next_batch", slow_input)
    monkeypatch.setattr(Program, "eval_step", slow_evaluation)
    begin = time.perf_counter()
    loop.train(config, began=begin)
    total = time.perf_counter() - begin

    report = (tmp_path / "runs/run/stalls.txt").read_text()
    stalls = [line for line in report.splitlines() if line.startswith("stalled ")]
    # A machine that is busy with other things may add a stall of its own, never take one of these away.
    assert "stalled after step 5: no input batch has come for train.stall_seconds=0.5, process 0" in stalls
    assert "stalled after step 6: no evaluation batch has completed for train.stall_seconds=0.5, process 0" in stalls
    assert "in slow_evaluation" in report
    captured = capfd.readouterr()
    assert stalls[0] in captured.err
    assert "Time of this process: " in captured.out

    records = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    lines = {record["step"]: record for record in records if "train/loss" in record}
    assert list(lines) == [2, 4, 6]
    assert 1.4 < lines[6]["time/input_wait"] < total
    assert lines[4]["time/input_wait"] < 1.4
    for line in lines.values():
        spent = sum(value for key, value in line.items() if key.startswith("time/total_"))
        assert 0 < spent < total
        assert line["time/goodput"] == pytest.approx(line["time/total_steps"] / spent, rel=0.01)
        assert line["time/hbm_in_use"] is None
    assert lines[6]["time/total_compilation"] > 0
    assert lines[4]["time/total_checkpoint"] > 0
    assert lines[4]["time/total_evaluation"] > 0
    # Nothing else was done between the results of steps 4 and 5, which is seen once the sixth batch has come.
    assert 0 < lines[6]["time/step_p50"] <= lines[6]["time/step_p90"] <= lines[6]["time/step_max"]
    assert lines[6]["time/step_max"] > 1.4


def test_a_stall_may_end_the_process(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    ledger = TimeLedger()
    with Watchdog(ledger, 0.2, epath.Path(tmp_path), where=lambda: "after step 3", end=True):
        time.sleep(0.6)  # start-up may take as long as it does
        assert not (tmp_path / "stalls.txt").exists()
        ledger.enter("compilation")
        time.sleep(0.6)
        assert not (tmp_path / "stalls.txt").exists()
        ledger.enter("checkpoint")
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.6)
        ledger.enter("other")
    assert ended == [watchdog.STALLED]
    assert (tmp_path / "stalls.txt").read_text().count("saving a checkpoint has not returned") == 1
