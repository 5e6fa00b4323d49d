"""log.txt has what a run printed, and how each of its processes ended; and it stops no run."""

import dataclasses
import io
import json
import re
import sys
import threading

import numpy as np
import pytest
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import REQUEUE, ConfigError, RunStopped
from hybridnorm_jax.training import loop, text_log
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.text_log import TextLog

pytestmark = pytest.mark.usefixtures("shared_programs")
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


def lines(directory):
    """Without their times, which all of them have."""
    found = (directory / "log.txt").read_text().splitlines()
    assert all(STAMP.match(line) for line in found)
    return [STAMP.sub("", line, count=1) for line in found]


def log_of(directory, action):
    with TextLog() as log:
        log.open(epath.Path(directory), about={})
        action()
    first, *others, last = lines(directory)
    assert first == "start: {}"
    assert last == "end: finished"
    return others


def test_lines_of_both_streams_come_in_order_and_are_still_printed(tmp_path, capsys):
    def speak():
        print("one", "and", "two")
        print("a warning", file=sys.stderr)
        print("\x1b[31mred\x1b[0m\nthree, ", end="")
        print("four")
        sys.stdout.write("no end of line")

    assert log_of(tmp_path, speak) == ["one and two", "a warning", "red", "three, four", "no end of line"]
    captured = capsys.readouterr()
    assert captured.out.startswith("one and two\n\x1b[31mred")
    assert captured.err == "a warning\n"


def test_a_progress_bar_leaves_a_line_now_and_then(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(text_log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def draw():
        for step in range(100):
            sys.stderr.write(f"\rstep {step}/100 |##  |")
            now[0] += 1.0
        sys.stderr.write("\r          \r")
        sys.stderr.write("step 99: evaluation loss 2.5\n")
        sys.stderr.write("\rstep 100/100 |####|\n")

    kept = log_of(tmp_path, draw)
    assert kept[-2:] == ["step 99: evaluation loss 2.5", "step 100/100 |####|"]
    assert kept[:-2] == [f"step {step}/100 |##  |" for step in (0, 30, 60, 90)]


def test_nothing_is_written_before_the_run_may_begin(tmp_path):
    with TextLog() as log:
        print("found a checkpoint")
        assert list(tmp_path.iterdir()) == []
        log.open(epath.Path(tmp_path), about={"after_step": 7})
        print("going on")
    start, *others = lines(tmp_path)
    assert json.loads(start.removeprefix("start: "))["after_step"] == 7
    assert others == ["found a checkpoint", "going on", "end: finished"]
    with pytest.raises(ConfigError), TextLog():
        raise ConfigError("refused")
    assert lines(tmp_path)[-1] == "end: finished"


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (ConfigError("train.x: no"), "end: failed: train.x: no"),
        (KeyError("planted"), "end: failed: KeyError: 'planted'"),
        (RunStopped(REQUEUE, "step 4 is saved"), "end: stopped: by SIGTERM or a preemption notice: step 4"),
        (KeyboardInterrupt(), "end: stopped: KeyboardInterrupt"),
    ],
)
def test_the_last_line_says_how_the_process_ended(error, end, tmp_path):
    def fail():
        with TextLog() as log:
            log.open(epath.Path(tmp_path), about={})
            raise error

    with pytest.raises(type(error)):
        fail()
    found = lines(tmp_path)
    assert found[-1].startswith(end)
    # Only what nobody can mend comes with a traceback.
    assert any("Traceback" in line for line in found) == isinstance(error, KeyError)


def test_a_log_that_cannot_be_written_or_hangs_is_left_out(tmp_path, capsys, monkeypatch):
    def speak():
        with TextLog() as log:
            log.open(epath.Path(tmp_path), about={})
            for number in range(3):
                print(number)

    (tmp_path / "log.txt").mkdir()
    speak()
    captured = capsys.readouterr()
    assert captured.out == "0\n1\n2\n"
    assert captured.err == f"log.txt: {tmp_path}/log.txt: Is a directory; the run goes on without it\n"

    over = threading.Event()
    monkeypatch.setattr(text_log, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(text_log.AppendOnlyFile, "append", lambda *_: over.wait(60))
    speak()
    over.set()
    assert capsys.readouterr().err == "log.txt: no answer within 0.3 seconds; the run goes on without it\n"


class StopsAfter(Hook):
    def after_step(self, run):
        if run.step == 2:
            raise RunStopped(REQUEUE, "told to")


def test_a_run_that_is_stopped_and_goes_on_has_one_log(tmp_path, small_config, capsys):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default, files = RunConfig(), (str(tmp_path / "tokens.npy"),)
    config = RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=str(tmp_path)),
        model=small_config(scheme="pre", num_layers=1),
        data=dataclasses.replace(
            default.data, source="tokens", files=files, validation={"train_same": files}, validation_fraction=0.0
        ),
        train=TrainSection(4, 8, 8),
        eval=dataclasses.replace(default.eval, batches=1),
    )
    with pytest.raises(RunStopped):
        loop.train(config, hooks=[StopsAfter()])
    loop.train(config)
    found = lines(tmp_path / "run")
    starts = [json.loads(line.removeprefix("start: ")) for line in found if line.startswith("start: ")]
    assert [start["after_step"] for start in starts] == [0, 2]
    assert {"jax", "python"} <= starts[0]["versions"].keys()
    ends = [line for line in found if line.startswith("end: ")]
    assert len(ends) == 2
    assert ends[0].endswith("step 2 is saved; the same command goes on")
    assert ends[1] == found[-1] == "end: finished"
    printed = capsys.readouterr().out.splitlines()
    for line in ("devices      ", "Evaluation after step 4", "throughput"):
        assert any(one.startswith(line) for one in found) == any(one.startswith(line) for one in printed)
    assert any("goes on after step 2 of 4" in line for line in found)


def test_of_a_service_that_says_much_the_log_gives_one_line(tmp_path, capsys, monkeypatch):
    def refuses(*_):
        raise RuntimeError("the bucket\nanswers " + "at length " * 100)

    monkeypatch.setattr(text_log.AppendOnlyFile, "append", refuses)
    with TextLog() as log:
        log.open(epath.Path(tmp_path), about={})
        print("a line")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("log.txt: the bucket answers at length at length")
    assert line.endswith(" ...; the run goes on without it")
    assert len(line) < 350
