"""A run on a file system that becomes full: it ends in one line, and what was saved is whole."""

import random
import subprocess
import sys

import pytest
from faults.harness import Harness
from processes import REPOSITORY, environment

from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.metrics_file import read_metrics


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_the_same_command_goes_on(small_disk, tmp_path):
    harness = Harness(tmp_path, random.Random(0))
    harness.write_tokens()
    words = [*harness.words("run"), f"run.dir={small_disk}", "train.steps=20000", "checkpoint.every=100"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *words, "eval.every=1000"]

    def run():
        done = subprocess.run(command, env=environment(2), capture_output=True, text=True, timeout=200, check=False)
        return done.returncode, done.stderr.splitlines()[-1]

    status, line = run()
    assert status == 2
    assert line.startswith(f"error: {small_disk}/run/")
    assert line.endswith("No space left on device") or "no space left on device" in line
    with Checkpoints(small_disk / "run/checkpoints", keep=3) as checkpoints:
        saved = checkpoints.usable()
    assert saved >= 100
    assert len(read_metrics(small_disk / "run").records) >= saved

    # Nothing hangs on a disk that is full from the start either, and no checkpoint is lost.
    status, line = run()
    assert status == 2
    with Checkpoints(small_disk / "run/checkpoints", keep=3) as checkpoints:
        assert checkpoints.usable() >= saved
