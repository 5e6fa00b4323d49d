"""One run directory, one run: who is refused, what a killed process leaves, and the lock of a bucket."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training import loop, run_lock
from hybridnorm_jax.training.run_lock import RunLock


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path / "runs/run")


def _content(directory):
    return (directory / "lock").read_text()


def test_a_second_run_is_refused_in_one_line_that_names_the_first(directory):
    refusal = (
        rf"^{directory}: in use by process {os.getpid()} on {socket.gethostname()} since "
        r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\S+; end that run first, or choose another run\.name$"
    )
    with RunLock(directory):
        before = _content(directory)
        for _ in range(2):
            with pytest.raises(UserError, match=refusal), RunLock(directory):
                pytest.fail("two have the lock")
        assert _content(directory) == before
    with RunLock(directory):
        pass
    assert not directory.parent.exists()  # made for the lock alone


def test_training_a_held_directory_is_refused_before_anything_is_written(directory, small_config, monkeypatch):
    np.save(directory.parent.parent / "tokens.npy", np.zeros(100, np.uint16))
    default = RunConfig()
    files = (str(directory.parent.parent / "tokens.npy"),)
    config = RunConfig(
        run=dataclasses.replace(default.run, name="run", dir=str(directory.parent)),
        model=small_config(num_layers=1),
        data=dataclasses.replace(default.data, source="tokens", files=files, validation_fraction=0.0),
        train=TrainSection(2, 8, 8),
    )
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("data must not be read"))
    with RunLock(directory):
        with pytest.raises(UserError, match="in use by process"):
            loop.train(config)
        assert [path.name for path in directory.iterdir()] == ["lock"]


def test_a_killed_process_leaves_no_lock_and_its_children_none_either(tmp_path):
    """A process that is killed while a child of its own, made by fork, lives on."""
    code = f"""
import os, sys, time
from etils import epath
from etils.epath.backend import fsspec_backend
from hybridnorm_jax.training.run_lock import _FileLock
from pathlib import Path
lock = _FileLock(Path({str(tmp_path)!r}) / "lock")
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)  # by the child itself: by now it has done what it does after a fork
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} "), RunLock(epath.Path(tmp_path)):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)
        assert json.loads((tmp_path / "lock").read_text())["process"] == process.pid  # the file alone holds nobody up
        with RunLock(epath.Path(tmp_path)):
            assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_the_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Between opening and locking, the one before has removed its file and a third has made another one."""
    flock, calls = fcntl.flock, []

    def late(file, how):
        if not calls:
            (tmp_path / "lock").unlink()
            (tmp_path / "lock").touch()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", late)
    with RunLock(epath.Path(tmp_path)):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(UserError, match="in use"), RunLock(epath.Path(tmp_path)):
            pass


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_is_named(kind, tmp_path):
    path = tmp_path / "run"
    path.touch() if kind == "file" else path.symlink_to("/nowhere/at/all")
    with pytest.raises(UserError, match=rf"^{path}: cannot be made a run's directory"), RunLock(epath.Path(path)):
        pass


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")


@pytest.fixture
def bucket(monkeypatch):
    """A run's directory in a bucket, where everything takes a hundredth of the time."""
    for protocol in Bucket.protocol:
        monkeypatch.setitem(_registry, protocol, Bucket)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    _hurry(monkeypatch)
    fsspec_backend._get_filesystem.cache_clear()
    yield epath.Path("gs://bucket/runs/run")
    fsspec_backend._get_filesystem.cache_clear()  # other tests want to see what is missing


def _hurry(monkeypatch):
    for name, seconds in {"BEAT_SECONDS": 0.1, "LEFT_OVER_SECONDS": 0.6, "SETTLE_SECONDS": 0.03}.items():
        monkeypatch.setattr(run_lock, name, seconds)


def test_a_bucket_has_a_lock_that_beats(bucket, capsys):
    with RunLock(bucket) as lock:
        first = _content(bucket)
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on {socket.gethostname()} "):
            RunLock(bucket).__enter__()
        assert _content(bucket) != first
        lock.raise_if_lost()
    assert not (bucket / "lock").exists()


def test_a_lock_that_no_longer_beats_was_left_over(bucket, capsys):
    bucket.mkdir(parents=True, exist_ok=True)
    (bucket / "lock").write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "then"}))
    began = time.monotonic()
    with RunLock(bucket):
        assert time.monotonic() - began >= 0.6
        assert json.loads(_content(bucket))["process"] == os.getpid()
    assert "process 7 on elsewhere since then may hold this run" in capsys.readouterr().err


def _holder_that_ended():
    process = multiprocessing.get_context("spawn").Process()
    process.start()
    process.join()
    return run_lock.holder() | {"process": process.pid}


def test_a_lock_of_a_process_here_that_ended_is_taken_at_once(bucket, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "LEFT_OVER_SECONDS", 1000)
    bucket.mkdir(parents=True, exist_ok=True)
    (bucket / "lock").write_text(json.dumps(_holder_that_ended()))
    with RunLock(bucket):
        assert json.loads(_content(bucket))["process"] == os.getpid()


@pytest.mark.parametrize("among", ["boot pid:[4026532000]", None])
def test_a_process_of_another_container_may_live_though_its_number_is_nobodys_here(bucket, among):
    """Containers on one machine, or with its network, have its host name and process numbers of their own."""
    bucket.mkdir(parents=True, exist_ok=True)
    (bucket / "lock").write_text(json.dumps(_holder_that_ended() | {"among": among}))
    began = time.monotonic()
    with RunLock(bucket):
        assert time.monotonic() - began >= 0.6


def test_a_run_whose_lock_was_taken_over_ends(bucket):
    with RunLock(bucket) as lock:
        (bucket / "lock").write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "now", "token": "x"}))
        deadline = time.monotonic() + 20
        while not lock._lock.is_lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(UserError, match="another run has taken it over"):
            lock.raise_if_lost()
    assert "elsewhere" in _content(bucket)  # and leaves the other's lock alone


def test_a_file_system_without_flock_gets_a_lock_that_beats(directory, monkeypatch):
    def unsupported(*_):
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    _hurry(monkeypatch)
    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    directory.mkdir(parents=True)
    with RunLock(directory), pytest.raises(UserError, match="in use by process"):
        RunLock(directory).__enter__()


def test_nothing_is_waited_for_where_there_is_no_flock_and_no_other_run(directory, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(run_lock.errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(run_lock, "LEFT_OVER_SECONDS", 1000)
    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    with RunLock(directory):
        assert json.loads((directory / "lock").read_bytes())["process"] == os.getpid()
    assert capsys.readouterr().err == ""
    assert not (directory / "lock").exists()
