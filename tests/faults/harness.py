"""Kill a small training run at random moments, start it again, and compare its end with that of an undisturbed run.

    python -m tests.faults.harness --kills 100 [--seed 0] [--signal KILL|TERM|both] [--directory DIR]

Every run is train.py in a process of its own, started by one and the same command. Moments are drawn by kind: while it
starts, between any two steps, in a save, in an evaluation. Every run that reaches its end must have the state of the
undisturbed run bit for bit and the same losses at the same steps; then the next run begins, until all kills are spent.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.stopping import REQUEUE

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 4, 6
# A run is disturbed at most so often, so that many reach their end.
KILLS_PER_RUN = 5
MOMENTS = ("start", "step", "save", "evaluation")
TIMEOUT = 300
# Fast to compile, and the same arithmetic in every process.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


class HarnessError(AssertionError):
    """A run that did not survive what it must survive."""


@dataclasses.dataclass
class Harness:
    """Runs below one directory, which holds their data and the compilation cache as well."""

    directory: Path
    random: random.Random
    start_seconds: float = 0.0
    tally: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def prepare(self) -> None:
        """Write the data and make the undisturbed run."""
        tokens = np.random.default_rng(0).integers(0, 61, 20_000).astype(np.uint16)
        np.save(self.directory / "tokens.npy", tokens)
        begin = time.monotonic()
        child = self._start("whole")
        _wait_until(child, lambda: self._records("whole"))
        self.start_seconds = time.monotonic() - begin
        self._expect(child, 0)

    def words(self, name: str) -> list[str]:
        """What train.py is called with."""
        tokens = self.directory / "tokens.npy"
        return [
            *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "model.vocab_size=61"),
            *("model.dropout=0.1", "data.source=tokens", f"data.files=[{tokens}]"),
            *("data.validation_fraction=0", f"data.validation.train=[{tokens}]"),
            *(f"train.steps={STEPS}", "train.batch_size=4", "train.seq_len=16", "train.log_every=1"),
            *("train.skip_spikes_sigma=3", "train.spike_window=4", "train.max_bad_steps=1000"),
            *(f"checkpoint.every={SAVE_EVERY}", f"eval.every={EVALUATE_EVERY}", "eval.batches=4"),
            *(f"run.dir={self.directory / 'runs'}", f"run.name={name}", "train.sample_tokens=0"),
        ]

    def disturb(self, name: str, signals: list[signal.Signals], moments: list[str]) -> int:
        """Send these signals, one per start, each at the moment of its kind, then let the run end; compare.

        Returns how many of them met a process that was still running.
        """
        met = 0
        for number, moment in zip(signals, moments, strict=True):
            child = self._start(name)
            moment = self._wait_for(child, name, moment)
            if child.poll() is None:
                met += 1
                self.tally[f"{number.name} {moment}"] += 1
                child.send_signal(number)
            # Before train.py's first lines and after its last, a signal ends any Python process.
            bare = number == signal.SIGKILL or moment == "start" or self._has_ended(name, child)
            self._expect(child, 0, *([-number] if bare else []), *([REQUEUE] if number == signal.SIGTERM else []))
        self._expect(self._start(name), 0)
        self.compare(name)
        return met

    def compare(self, name: str) -> None:
        """HarnessError unless the run ended as the undisturbed one."""
        ours, expected = (self._final_state(run) for run in (name, "whole"))
        for (path, left), right in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
            if not np.array_equal(left, right):
                raise HarnessError(f"{name}: {jax.tree_util.keystr(path)} differs from the undisturbed run")
        if self._untimed(name) != self._untimed("whole"):
            raise HarnessError(f"{name}: metrics.jsonl differs from the undisturbed run")

    def _has_ended(self, name: str, child: subprocess.Popen) -> bool:
        """Whether the process, once it has ended, left the complete state of the last step."""
        self._wait(child)
        return (self.directory / "runs" / name / "checkpoints" / f"{STEPS:06d}" / "manifest" / "0-of-1.json").exists()

    def _start(self, name: str) -> subprocess.Popen:
        environment = os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(self.directory / "cache")}
        log = (self.directory / f"{name}.log").open("ab")
        command = [sys.executable, str(REPOSITORY / "train.py"), *self.words(name)]
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=self.directory)

    def _wait_for(self, child: subprocess.Popen, name: str, moment: str) -> str:
        """Until a random moment of this kind, or the end of the process; the kind, where there is such a moment."""
        old = {record["step"] for record in self._records(name)}
        due = [step for step in range(EVALUATE_EVERY, STEPS, EVALUATE_EVERY) if step not in old]
        if moment == "evaluation" and not due:
            moment = "start"
        if moment == "start":
            _sleep(child, self.random.uniform(0, self.start_seconds))
            return moment
        before = len(self._records(name))
        if moment == "step":
            target = self.random.randrange(1, STEPS)
            _wait_until(child, lambda: self._fresh(name, before) >= target)
            _sleep(child, self.random.uniform(0, 0.02))
        elif moment == "save":
            folder = self.directory / "runs" / name / "checkpoints"
            for _ in range(self.random.randrange(1, 4)):
                old = _unfinished(folder)
                _wait_until(child, lambda old=old: _unfinished(folder) - old)
            _sleep(child, self.random.uniform(0, 0.1))
        else:
            step = self.random.choice(due)
            _wait_until(child, lambda: any(record["step"] == step for record in self._records(name)))
            _sleep(child, self.random.uniform(0, 0.05))
        return moment

    def _fresh(self, name: str, before: int) -> int:
        """Steps recorded since the process was started; resuming may have dropped some that were recorded before."""
        return len(self._records(name)) - before

    def _records(self, name: str) -> list[dict]:
        file = self.directory / "runs" / name / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def _untimed(self, name: str) -> list[dict]:
        timed = ("tokens_per_second", "mfu", "time/")
        return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in self._records(name)]

    def _final_state(self, name: str):
        abstract = Program(parse(self.words(name))).abstract_state
        with Checkpoints(self.directory / "runs" / name / "checkpoints", keep=1) as checkpoints:
            return jax.device_get(checkpoints.restore(abstract, STEPS))[0]

    def _expect(self, child: subprocess.Popen, *codes: int) -> None:
        status = self._wait(child)
        if status not in codes:
            raise HarnessError(f"{' '.join(child.args)}: ended with {status}, not one of {codes}")

    def _wait(self, child: subprocess.Popen) -> int:
        try:
            return child.wait(TIMEOUT)
        except subprocess.TimeoutExpired as error:
            child.kill()
            child.wait()
            raise HarnessError(f"{' '.join(child.args)}: still running after {TIMEOUT} seconds") from error


def _unfinished(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.orbax-checkpoint-tmp")} if folder.exists() else set()


def _wait_until(child: subprocess.Popen, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while child.poll() is None and not happened():
        if time.monotonic() > deadline:
            child.kill()
            child.wait()
            raise HarnessError(f"{' '.join(child.args)}: nothing happened within {TIMEOUT} seconds")
        time.sleep(0.002)


def _sleep(child: subprocess.Popen, seconds: float) -> None:
    """Sleep, but not longer than the process lives."""
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(min(0.002, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM", "both"), default="both")
    parser.add_argument("--directory", type=Path, help="kept afterwards; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        harness = Harness(directory.resolve(), random.Random(options.seed))
        harness.prepare()
        kinds = (
            [signal.SIGKILL, signal.SIGTERM] if options.signal == "both" else [signal.Signals[f"SIG{options.signal}"]]
        )
        done, runs = 0, 0
        while done < options.kills:
            runs += 1
            count = min(KILLS_PER_RUN, options.kills - done)
            drawn = [harness.random.choice(kinds) for _ in range(count)]
            moments = [harness.random.choice(MOMENTS) for _ in range(count)]
            done += harness.disturb(f"run{runs}", drawn, moments)
            print(f"{done} of {options.kills} kills, {runs} runs equal to the undisturbed one", flush=True)
    print(", ".join(f"{kind}: {count}" for kind, count in sorted(harness.tally.items())))


if __name__ == "__main__":
    main()
