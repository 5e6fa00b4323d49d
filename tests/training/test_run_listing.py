"""The runs of a folder at a glance: how far each is, how it ended, and what is damaged or no run."""

import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from hybridnorm_jax.commands.runs import run as show_runs
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.yaml_files import to_yaml
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training import lock_holder, newest_metrics
from hybridnorm_jax.training.run_listing import SORTS, RunGroup, list_runs
from hybridnorm_jax.training.run_lock import RunLock
from hybridnorm_jax.training.run_status import run_status

CONFIG = to_yaml(parse(["quickstart", "model.scheme=peri", "train.steps=100", "run.name=x"]))
LOSS = {"step": 100, "train/loss": 2.5, "tokens_per_second": 1000.0}
SCORE = {"step": 100, "eval/validation/loss": 2.25, "eval/task/x/acc": 0.5}
STARTED = "2026-11-28T09:56:48Z start: {}\n2026-11-28T09:56:49Z step 1/100: loss 3.0\n"


def make_run(directory, *records, log=None, config=CONFIG, result=None):
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(config)
    if records:
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if log is not None:
        (directory / "log.txt").write_text(log)
    if result is not None:
        (directory / "result.json").write_text(json.dumps(result))
    return epath.Path(directory)


def log(end):
    return f"{STARTED}2026-11-28T09:57:19Z end: {end}\n"


KILLED = ("failed", "it was killed, or its machine was lost")


@pytest.mark.parametrize(
    ("records", "files", "expected"),
    [
        ([LOSS, SCORE], {"log": log("finished")}, ("finished", "")),
        ([LOSS], {"log": log("stopped: by SIGINT: step 50 is saved")}, ("stopped", "by SIGINT: step 50 is saved")),
        ([LOSS], {"log": log("failed: step 7: loss is nan")}, ("failed", "step 7: loss is nan")),
        ([LOSS | {"step": 50}], {"log": STARTED}, KILLED),
        ([LOSS], {"log": log("finished") + STARTED}, KILLED),
        ([], {"log": STARTED}, KILLED),
        ([], {}, ("never started", "")),
        # Runs of earlier versions have no log.
        ([LOSS, SCORE], {}, ("finished", "")),
        ([LOSS | {"step": 50}], {}, ("stopped", "")),
        ([LOSS], {"result": {"status": "diverged", "diverged_at": 60}}, ("failed", "diverged at step 60")),
    ],
)  # fmt: skip
def test_how_a_run_ended(records, files, expected, tmp_path):
    found = run_status(make_run(tmp_path / "run", *records, **files))
    assert (found.status, found.why) == expected
    assert (found.name, found.scheme, found.steps) == ("run", "peri", 100)


def test_a_run_whose_lock_is_held_runs(tmp_path):
    run = make_run(tmp_path / "run", LOSS, log=STARTED)
    with RunLock(run):
        assert run_status(run).status == "running"
    assert (run_status(run).status, run_status(run).why) == KILLED


def test_locks_of_others(tmp_path):
    run = make_run(tmp_path / "run", LOSS, log=STARTED)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run / "lock").write_text(json.dumps(lock_holder.holder() | {"process": ended.pid}))
    assert (run_status(run).status, run_status(run).why) == KILLED
    ended = subprocess.Popen(["true"])
    time.sleep(0.5)  # it has ended, and nobody has asked about it
    (run / "lock").write_text(json.dumps(lock_holder.holder() | {"process": ended.pid}))
    assert (run_status(run).status, run_status(run).why) == KILLED
    ended.wait()

    elsewhere = {"host": f"not-{socket.gethostname()}", "process": 7, "since": "yesterday"}
    (run / "lock").write_text(json.dumps(elsewhere))
    found = run_status(run)
    assert (found.status, found.why) == ("running", f"process 7 on {elsewhere['host']} since yesterday")
    hour_ago = time.time() - 3605
    for file in run.iterdir():
        os.utime(file, (hour_ago, hour_ago))
    found = run_status(run)
    assert found.status == "failed"
    assert found.why.startswith("nothing written for 1 h 0 min by process 7 on not-")


def test_the_newest_numbers_are_found_behind_long_lines_and_superseded_ones_are_not(tmp_path, monkeypatch):
    long = {"train/losses": [1.0] * 3000}
    records = [
        {"step": 10, "eval/v/loss": 5.0, "eval/w/loss": 6.0},
        *({"step": step, "train/loss": float(step), "tokens_per_second": 7.0, **long} for step in range(11, 31)),
        {"step": 40, "eval/v/loss": 4.0, "eval/w/loss": None},
        {"resumed_from": 25, "time": "now"},
        {"step": 26, "train/loss": None, "tokens_per_second": None},
    ]
    run = make_run(tmp_path / "run", *records)
    for piece in (100, 16 * 1024, 1024**2):
        monkeypatch.setattr(newest_metrics, "PIECE_BYTES", piece)
        newest = run_status(run).newest
        assert newest.step == 26
        assert math.isnan(newest.loss)
        assert (newest.rate, newest.validation, newest.evaluated) == (7.0, {"v": 5.0, "w": 6.0}, 10)
    assert run_status(run).as_json()["train_loss"] is None
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 27, "train/lo')  # torn
    assert run_status(run).newest.step == 26


def test_folders_comparisons_and_what_is_damaged_or_foreign(tmp_path):
    make_run(tmp_path / "good", LOSS, SCORE, log=log("finished"))
    make_run(tmp_path / "bad yaml", LOSS, config="model: [")
    make_run(tmp_path / "bad result", LOSS).joinpath("result.json").write_text("{")
    make_run(tmp_path / "edited", config="train: {steps: 7}\nmodel: {scheme: pre}")
    (tmp_path / "config is a folder" / "config.yaml").mkdir(parents=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / ".partial-run").mkdir()
    (tmp_path / "a file").write_text("x")
    for scheme, loss in (("pre", 3.0), ("peri", 2.0), ("post", None)):
        config = CONFIG.replace("scheme: peri", f"scheme: {scheme}")
        make_run(tmp_path / "lab" / scheme, SCORE | {"eval/validation/loss": loss}, config=config)
    (tmp_path / "lab/comparison.json").write_text("{}")
    for sort, key in SORTS.items():
        listed = {one.name: one for one in sorted(list_runs(str(tmp_path)), key=key)}
        assert len(listed) == 7, sort
    assert (listed["good"].status, listed["edited"].status) == ("finished", "never started")
    assert (listed["edited"].scheme, listed["edited"].steps) == ("pre", 7)
    assert listed["bad yaml"].status == "damaged"
    assert listed["bad yaml"].why.startswith("config.yaml, line 2: not valid YAML")
    assert (listed["bad result"].status, listed["bad result"].why) == ("damaged", "result.json: cannot be read as JSON")
    assert (listed["config is a folder"].status, listed["foreign"].status) == ("damaged", "no run")
    assert listed["config is a folder"].why == "config.yaml: cannot be read (Is a directory)"
    group = listed["lab"]
    assert isinstance(group, RunGroup)
    assert group.is_comparison
    assert (group.statuses, group.best.name) == ({"finished": 3}, "peri")
    assert [one.name for one in list_runs(str(tmp_path / "lab"))] == ["peri", "post", "pre"]
    assert [one.name for one in list_runs(str(tmp_path / "good"))] == ["good"]
    json.dumps([one.as_json() for one in listed.values()], allow_nan=False)
    with pytest.raises(UserError, match="nowhere: no such directory; name one with runs"):
        list_runs(str(tmp_path / "nowhere"))


def make_config_binary(run):
    (run / "config.yaml").write_bytes(b"run:\n  name: \xdd\xff\n")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda run: (run / "metrics.jsonl").mkdir(), "metrics.jsonl: cannot be read (Is a directory)"),
        (lambda run: (run / "log.txt").mkdir(), "log.txt: cannot be read (Is a directory)"),
        (lambda run: (run / "lock").mkdir(), "lock: cannot be read (Is a directory)"),
        (lambda run: (run / "result.json").mkdir(), "result.json: cannot be read (Is a directory)"),
        (lambda run: (run / "checkpoints").touch(), "checkpoints: cannot be read (Not a directory)"),
        (make_config_binary, "config.yaml: no text in UTF-8 (byte 13)"),
        (
            lambda run: (run / "config.yaml").write_text("train:\n  steps: abc\n"),
            "config.yaml: train.steps=abc: expected an integer",
        ),
        (
            lambda run: (run / "config.yaml").write_text(f"model:\n  scheme: pre\ntrain:\n  steps: {10**30}\n"),
            f"config.yaml: train.steps={10**30}: must be at least 1 and at most 1,000,000,000",
        ),
    ],
    ids=["metrics", "log", "lock", "result", "checkpoints", "binary", "steps", "many steps"],
)
def test_what_is_damaged_names_the_file(tmp_path, damage, why):
    run = make_run(tmp_path / "run")
    damage(run)
    found = run_status(run)
    assert (found.status, found.why) == ("damaged", why)


def test_a_name_with_a_line_break_is_in_one_row(tmp_path, capsys):
    make_run(tmp_path / "a\nb")
    show_runs([str(tmp_path)])
    _, row = capsys.readouterr().out.splitlines()
    assert row.startswith("a\\nb ")


@pytest.fixture
def bucket(monkeypatch):
    class InMemory(MemoryFileSystem):
        protocol = ("gs", "gcs")

        def info(self, path, **keys):
            found = super().info(path, **keys)
            return found | ({"mtime": found["created"]} if "created" in found else {})

    monkeypatch.setitem(_registry, "gcs", InMemory)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    fsspec_backend._get_filesystem.cache_clear()
    yield epath.Path("gs://bucket/runs")
    fsspec_backend._get_filesystem.cache_clear()


def test_runs_in_a_bucket(bucket):
    run = bucket / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    (run / "metrics.jsonl.000001").write_text(json.dumps(SCORE) + "\n")
    (run / "metrics.jsonl.000002").write_text(json.dumps(LOSS) + "\n")
    (run / "log.txt.000001").write_text(log("finished"))
    (bucket / "foreign").mkdir()
    (bucket / "foreign" / "x").write_text("x")
    foreign, found = sorted(list_runs(str(bucket)), key=SORTS["name"])
    assert foreign.status == "no run"
    assert (found.status, found.newest.loss, found.newest.validation) == ("finished", 2.5, {"validation": 2.25})
    assert found.written > 0


def test_a_thousand_runs_are_listed_in_two_seconds_of_one_core_and_without_jax(tmp_path):
    """CPU seconds of a whole process, which hardly depend on what else the machine does."""
    lines = [LOSS | {"step": step, "train/losses": [2.5] * 10} for step in range(10, 100, 10)] + [SCORE]
    for number in range(1000):
        make_run(tmp_path / f"run{number}", *lines, log=log("finished"))
    code = f"""
import sys, time
from hybridnorm_jax.commands.main import main
assert main(["runs", {str(tmp_path)!r}, "--sort", "loss"]) == 0
print(time.process_time(), "jax" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1001
    seconds, has_jax = done.stderr.split()
    assert has_jax == "False"
    assert float(seconds) < 2
