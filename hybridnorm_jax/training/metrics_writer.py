"""Where a run's numbers go: metrics.jsonl, TensorBoard event files and, if asked for, Weights & Biases.

metrics.jsonl is the record of the run: where it cannot be written, the run ends. The two others hold nothing that it
does not: where one of them fails or hangs, the run goes on without it.
"""

import dataclasses
import math
import os
import secrets
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from hybridnorm_jax.errors import MissingExtraError, UserError, first_line
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.courier import Courier
from hybridnorm_jax.training.metrics_file import NAME, MetricsFile
from hybridnorm_jax.training.tensorboard_events import EventFile
from hybridnorm_jax.whole_files import is_local

# A network file system may take minutes until another server has taken over.
RECORD_SECONDS, COPY_SECONDS = 600.0, 120.0
# Weights & Biases may take so long to answer when a run begins.
WANDB_SECONDS = 60
REASON_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class WandbRun:
    """What Weights & Biases shows of a run: its project, its name, its configuration, and its group, None for none."""

    project: str
    name: str
    config: dict[str, Any]
    group: str | None = None


class MetricsWriter:
    """Writes <run>/metrics.jsonl, <run>/tensorboard and a Weights & Biases run.

    metrics.jsonl has one JSON object per line, "step" first. A value that is not a finite number is null, since JSON
    has neither NaN nor infinities; an array becomes nested lists. Every line is in the file when `write` returns.
    TensorBoard and Weights & Biases get the single values that are not null.

    Args:
      run_dir: exists already; local or gs://.
      resume_step: the step training goes on from: what was recorded of later steps stays in the file, superseded.
        None: the run begins, and all that was recorded before is superseded.
      wandb: also log to Weights & Biases; a resumed run goes on in its old Weights & Biases run. None: do not.
      enabled: False in all processes but one: then nothing is written.

    Raises:
      MissingExtraError: Weights & Biases or access to gs:// is not installed.
      UserError: metrics.jsonl cannot be written, or Weights & Biases cannot be started; then nothing was written.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        *,
        resume_step: int | None,
        wandb: WandbRun | None,
        enabled: bool = True,
    ):
        self._enabled = enabled
        if not enabled:
            return
        run_dir = epath.Path(run_dir)
        self._path = run_dir / NAME
        self._copies: list[_Copy] = []
        # Before anything is written, since it may refuse.
        if wandb is not None:
            self._copies.append(_wandb_copy(_start_wandb(run_dir, resume_step, wandb)))
        self._courier = Courier("metrics", seconds=RECORD_SECONDS)
        self._file = self._record(lambda: MetricsFile(run_dir, resume_step=resume_step or 0))
        if resume_step is None and (count := self._file.superseded):
            print(f"{run_dir}: no checkpoint, the run begins again; {NAME} keeps its {count} lines", file=sys.stderr)
        self._copies.append(_tensorboard_copy(run_dir, first=0 if resume_step is None else resume_step + 1))

    def write(self, step: int, values: dict[str, float | np.ndarray | None], *, by_layer: bool = False) -> None:
        """Record the values of one step; UserError where metrics.jsonl cannot be written.

        Args:
          by_layer: arrays have a value for each layer: TensorBoard and Weights & Biases get them too, as name/000, ...
        """
        if not self._enabled:
            return
        values = {name: _finite_or_none(value) for name, value in values.items()}
        entry = {"step": step, **values}
        self._record(lambda: self._file.append(entry))
        if by_layer:
            values = _single_values(values)
        known = {name: value for name, value in values.items() if isinstance(value, float)}
        for copy in self._copies:
            copy.write(step, known)

    def close(self) -> None:
        """Flush and release everything."""
        if not self._enabled:
            return
        for copy in self._copies:
            copy.close()
        self._record(self._file.close)
        self._courier.close()

    def _record(self, action: Callable[[], Any]) -> Any:
        """What `action` on metrics.jsonl returns; UserError where it fails or hangs."""
        try:
            return self._courier.call(action)
        except OSError as error:  # TimeoutError is one
            raise UserError(f"{error.filename or self._path}: cannot be written: {error.strerror or error}") from error


class _Copy:
    """Something that gets the numbers besides metrics.jsonl. Its first failure is said, and it gets nothing more.

    Args:
      name: of what it is, for the line.
      write: called with a step and its values, in a thread.
      finish: called at the end, in the same thread.
    """

    def __init__(
        self,
        name: str,
        *,
        write: Callable[[int, dict[str, float]], None],
        finish: Callable[[], None],
    ):
        self._name, self._write, self._finish = name, write, finish
        self._courier: Courier | None = Courier(name, seconds=COPY_SECONDS)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hand the values over; never waits."""
        self._attempt(lambda courier: courier.send(lambda: self._write(step, values)))

    def close(self) -> None:
        """Wait until everything is handed over, COPY_SECONDS at most."""
        self._attempt(lambda courier: courier.send(self._finish))
        self._attempt(lambda courier: courier.finish())
        if self._courier is not None:
            self._courier.close()

    def _attempt(self, action: Callable[[Courier], None]) -> None:
        if self._courier is None:
            return
        try:
            action(self._courier)
        except Exception as error:
            self._courier.close()
            self._courier = None
            print(
                f"{self._name}: {_reason(error)}; the run goes on without it, {NAME} has every number", file=sys.stderr
            )


def _tensorboard_copy(run_dir: epath.Path, *, first: int) -> _Copy:
    """The event files, which TensorBoard reads; `first` is the first step that this process makes."""
    events = EventFile(run_dir / "tensorboard", first=first)
    return _Copy("TensorBoard", write=events.write, finish=events.close)


def _wandb_copy(run: Any) -> _Copy:
    return _Copy(
        "Weights & Biases", write=lambda step, values: run.log({"step": step, **values}), finish=lambda: run.finish()
    )


def _reason(error: BaseException) -> str:
    """One line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return first_line(error)


def _finite_or_none(value: float | np.ndarray | None) -> float | list | None:
    if isinstance(value, np.ndarray) and value.ndim:
        return [_finite_or_none(part) for part in value]
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def _single_values(values: dict[str, Any]) -> dict[str, float | None]:
    """Lists by their elements."""
    single = {}
    for name, value in values.items():
        if isinstance(value, list):
            single |= {f"{name}/{number:03d}": part for number, part in enumerate(value)}
        else:
            single[name] = value
    return single


def _start_wandb(run_dir: epath.Path, resume_step: int | None, shown: WandbRun) -> Any:
    """A Weights & Biases run with "step" on its axes; the id kept in <run>/wandb_id ties it to this run directory."""
    os.environ.setdefault("WANDB_SILENT", "true")  # it would write dozens of lines between ours
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("run.wandb=true", extra="wandb") from error
    id_file = run_dir / "wandb_id"
    is_known = resume_step is not None and id_file.exists()
    name = id_file.read_text() if is_known else secrets.token_hex(4)
    had_files = (run_dir / "wandb").exists()
    try:
        run = wandb.init(
            project=shown.project,
            name=shown.name,
            group=shown.group,
            id=name,
            resume="allow",
            dir=str(run_dir) if is_local(run_dir) else None,
            config=shown.config,
            settings=wandb.Settings(init_timeout=WANDB_SECONDS),
        )
        # wandb's own step must grow, and falls back on resuming; ours is an axis like any other.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
    except Exception as error:
        if not had_files and is_local(run_dir):
            shutil.rmtree(run_dir / "wandb", ignore_errors=True)
        right = "log in with `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline"
        reason = textwrap.shorten(str(error), REASON_CHARACTERS, placeholder=" ...") or type(error).__name__
        raise UserError(f"run.wandb=true: Weights & Biases cannot be started ({reason}); {right}") from error
    if not run.offline:
        say(f"Weights & Biases: {run.url}")
    if not is_known:
        try:
            id_file.write_text(name)
        except OSError as error:
            raise UserError(f"{id_file}: cannot be written: {error.strerror or error}") from error
    return run
