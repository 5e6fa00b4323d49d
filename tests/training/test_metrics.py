"""metrics.jsonl survives kills and resumes."""

import errno
import json
import math
import struct
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from tensorboardX.proto.event_pb2 import Event

from hybridnorm_jax import append_only
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.loggers.logger import Logger
from hybridnorm_jax.loggers.logger_kinds import run_loggers
from hybridnorm_jax.training import metrics_file, metrics_writer
from hybridnorm_jax.training.metrics_file import read_metrics, read_records
from hybridnorm_jax.training.metrics_writer import MetricsWriter


def open_writer(run_dir, *, resume_step=None, loggers=None, enabled=True):
    loggers = run_loggers(["tensorboard"]) if loggers is None else loggers
    return MetricsWriter(run_dir, resume_step=resume_step, loggers=loggers, config=RunConfig(), enabled=enabled)


def close(writer):
    writer.__exit__(None, None, None)


def entries(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensorboard_events(run_dir):
    """Every event in the event files: records of length, its checksum, content, its checksum."""
    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(10, {"train/loss": 2.5, "mfu": None})
    assert entries(tmp_path) == [{"step": 10, "train/loss": 2.5, "mfu": None}]
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 10,')
    close(writer)


def test_values_that_json_does_not_have_become_null(tmp_path):
    writer = open_writer(tmp_path)
    values = {"nan": math.nan, "inf": -math.inf, "device": jax.numpy.float32(1.5), "numpy": np.float32(0.5)}
    writer.write(1, values)
    close(writer)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 1, "nan": None, "inf": None, "device": 1.5, "numpy": 0.5}
    assert json.loads(line, parse_constant=refuse) == expected


def test_tensorboard_gets_what_is_not_null(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(4, {"train/loss": 2.0, "mfu": None, "bad": math.nan})
    close(writer)
    found = [
        (value.tag, event.step, value.simple_value)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    ]
    assert found == [("train/loss", 4, 2.0)]


def test_tensorboard_gets_the_values_of_each_layer(tmp_path):
    writer = open_writer(tmp_path)
    layers = {"watch/rms": np.array([1.0, math.nan, 3.0]), "watch/head": np.array(2.0)}
    writer.write(1, layers)
    writer.write(2, {"train/losses": np.array([4.0, 5.0])})
    close(writer)
    found = {value.tag: value.simple_value for event in tensorboard_events(tmp_path) for value in event.summary.value}
    assert found == {"watch/rms/000": 1, "watch/rms/002": 3, "watch/head": 2}
    assert entries(tmp_path)[0] == {"step": 1, "watch/rms": [1, None, 3], "watch/head": 2}


def test_resuming_supersedes_later_steps_and_takes_nothing_out(tmp_path, capsys):
    writer = open_writer(tmp_path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"train/loss": float(step)})
    close(writer)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    before = (tmp_path / "metrics.jsonl").read_text()
    writer = open_writer(tmp_path, resume_step=2)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
    writer.write(3, {"train/loss": 30.0})
    close(writer)
    assert [record["train/loss"] for record in read_records(tmp_path)] == [1.0, 2.0, 30.0]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith(before + '\n{"resumed_from": 2, "time": "')
    assert read_metrics(tmp_path).superseded == 2
    assert capsys.readouterr().err == ""  # a kill explains the incomplete line
    # TensorBoard hides what earlier event files hold of these steps and later ones.
    assert sorted(event.step for event in tensorboard_events(tmp_path) if event.HasField("session_log")) == [0, 3]
    close(open_writer(tmp_path, resume_step=3))
    assert (tmp_path / "metrics.jsonl").read_text() == text  # nothing was superseded, so there is nothing to say


def test_beginning_again_keeps_the_lines_and_says_so(tmp_path, capsys):
    writer = open_writer(tmp_path)
    writer.write(1, {"train/loss": 1.0})
    close(writer)
    before = (tmp_path / "metrics.jsonl").read_text()
    close(open_writer(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before + '{"resumed_from": 0')
    assert read_records(tmp_path) == []
    line = f"{tmp_path}: no checkpoint, the run begins again; metrics.jsonl keeps its 1 lines\n"
    assert capsys.readouterr().err == line


BAD = ('{"step": 2', "[]", '{"step": "2"}', '{"step": 2, "train/loss": "x"}', "[" * 100_000, '{"resumed_from": "x"}')


def test_bad_lines_hide_no_others_and_are_said_once(tmp_path, capsys):
    good = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([good[0], *BAD, good[1], good[2], ""]))
    for _ in range(2):
        assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{tmp_path}/metrics.jsonl, line 2: not a JSON object with a step and numbers; skipped, {len(BAD)} such line(s)"
    )


def test_a_full_disk_ends_the_run_in_one_line_and_hangs_nowhere(tmp_path, monkeypatch, capsys):
    """Thirty lines and the end; TensorBoard's failure is said once, that of metrics.jsonl is an error."""
    monkeypatch.setattr(append_only, "_LocalFile", FullDisk)
    monkeypatch.setattr(FullDisk, "full", "tfevents")
    began = time.monotonic()
    writer = open_writer(tmp_path)
    for step in range(30):
        writer.write(step, {"train/loss": 1.0})
    close(writer)
    assert len(read_records(tmp_path)) == 30
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"TensorBoard: {tmp_path}/tensorboard/events.out.tfevents.")
    assert line.endswith(": No space left on device; the run goes on without it, metrics.jsonl has every number")

    monkeypatch.setattr(FullDisk, "full", "metrics.jsonl")
    writer = open_writer(tmp_path, resume_step=29)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        writer.write(30, {"train/loss": 1.0})
    with pytest.raises(UserError, match="No space left"):
        close(writer)
    assert time.monotonic() - began < 10


class FullDisk(append_only._LocalFile):
    """Files whose path has `full` in it cannot be written."""

    full = ""

    def append(self, data):
        if self.full in self._path:
            raise OSError(errno.ENOSPC, "No space left on device", self._path)
        super().append(data)


def test_what_never_answers_is_given_up(tmp_path, monkeypatch, capsys):
    """A logger and metrics.jsonl hang; neither holds the caller."""
    answer = threading.Event()

    class Hangs(Logger):
        def write(self, step, values):
            answer.wait(60)

    monkeypatch.setattr(metrics_writer, "LOGGER_SECONDS", 0.2)
    writer = open_writer(tmp_path, loggers={"A service": Hangs()})
    began = time.monotonic()
    for step in (1, 2):
        writer.write(step, {"train/loss": 1.0})
    close(writer)
    assert time.monotonic() - began < 10
    line = "A service: no answer within 0.2 seconds; the run goes on without it, metrics.jsonl has every number"
    assert capsys.readouterr().err.splitlines() == [line]

    monkeypatch.setattr(metrics_writer, "RECORD_SECONDS", 0.2)
    writer = open_writer(tmp_path, resume_step=2)
    monkeypatch.setattr(append_only._LocalFile, "append", lambda *_: answer.wait(60))
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: no answer within 0\.2 seconds"):
        writer.write(3, {"train/loss": 1.0})
    answer.set()


def test_a_run_directory_that_is_removed_is_noticed(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(1, {"train/loss": 1.0})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: was removed or replaced"):
        writer.write(2, {"train/loss": 1.0})


def test_an_event_file_never_replaces_another_one_whatever_the_clock_says(tmp_path, monkeypatch):
    names = []
    for now in (5000.0, 5000.0, 10.0):
        monkeypatch.setattr("hybridnorm_jax.loggers.tensorboard.time.time", lambda now=now: now)
        writer = open_writer(tmp_path)
        writer.write(1, {"train/loss": 1.0})
        close(writer)
        names.append({path.name for path in (tmp_path / "tensorboard").iterdir()})
    first, second, third = names
    assert max(first) < max(second) < max(third)
    assert len(third) == 3


def test_other_processes_write_nothing(tmp_path):
    writer = open_writer(tmp_path, enabled=False)
    writer.write(1, {"train/loss": 1.0})
    close(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket/runs/name, a directory in memory, whose file system counts the bytes that are uploaded."""
    monkeypatch.setitem(_registry, "gcs", InMemory)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(InMemory, "uploaded", 0)
    run_dir = epath.Path("gs://bucket/runs/name")
    fsspec_backend._get_filesystem.cache_clear()
    run_dir.mkdir(parents=True, exist_ok=True)
    yield run_dir
    fsspec_backend._get_filesystem.cache_clear()  # other tests want to see what is missing


class InMemory(MemoryFileSystem):
    protocol = ("gs", "gcs")
    uploaded = 0

    def open(self, path, mode="rb", **keys):
        stream = super().open(path, mode, **keys)
        if "w" not in mode:
            return stream
        write = stream.write

        def counted(data):
            InMemory.uploaded += len(data)
            return write(data)

        stream.write = counted
        return stream


def test_a_bucket_has_every_line_at_once_and_nothing_is_written_over(bucket):
    writer = open_writer(bucket)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": float(step)})
        assert len(read_records(bucket)) == step
    close(writer)
    first = (bucket / "metrics.jsonl.000001").read_text()
    writer = open_writer(bucket, resume_step=2)
    writer.write(3, {"train/loss": 0.0})
    close(writer)
    assert [record["train/loss"] for record in read_records(bucket)] == [1.0, 2.0, 0.0]
    assert (bucket / "metrics.jsonl.000001").read_text() == first
    assert len([path for path in (bucket / "tensorboard").iterdir() if "tfevents" in path.name]) == 2


def test_twice_the_lines_upload_twice_the_bytes(bucket):
    uploaded = []
    for count in (500, 1000):
        before, directory = InMemory.uploaded, bucket / str(count)
        directory.mkdir(exist_ok=True)
        file = metrics_file.MetricsFile(directory, resume_step=0)
        for step in range(1000, 1000 + count):
            file.append({"step": step, "train/loss": 1.0})
        assert len(read_records(directory)) == count
        uploaded.append(InMemory.uploaded - before)
    assert 1.9 < uploaded[1] / uploaded[0] < 2.2


def test_a_bucket_that_was_copied_to_a_disk_is_gone_on_with(bucket, tmp_path):
    file = metrics_file.MetricsFile(bucket, resume_step=0)
    file.append({"step": 1})
    (tmp_path / "metrics.jsonl.000001").write_bytes((bucket / "metrics.jsonl.000001").read_bytes())
    writer = open_writer(tmp_path, resume_step=1)
    writer.write(2, {"train/loss": 1.0})
    close(writer)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
