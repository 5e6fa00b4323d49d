"""Where a run's numbers go: metrics.jsonl, and the loggers that run.loggers names.

metrics.jsonl is the record of the run: where it cannot be written, the run ends. The loggers get nothing that it does
not hold: where one of them fails or hangs, the run goes on without it.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import RunStopped, UserError, reason_of
from hybridnorm_jax.loggers.logger import FAILED, FINISHED, STOPPED, LoggedRun, Logger, Point
from hybridnorm_jax.training.courier import Courier, DispensableCourier
from hybridnorm_jax.training.metrics_file import NAME, Metrics, MetricsFile, single_values

# A network file system may take minutes until another server has taken over.
RECORD_SECONDS = 600.0
# How long a call of a logger may take, how long one may wait for those before it, and all of them together at the end.
LOGGER_SECONDS, LOGGER_WAIT_SECONDS = 120.0, 600.0
# The history is handed to a logger in pieces, each of which may take LOGGER_SECONDS.
LINES_OF_HISTORY = 100


class MetricsWriter:
    """Writes <run>/metrics.jsonl and hands its numbers to loggers; a context manager that tells them how the run ended.

    metrics.jsonl has one JSON object per line, "step" first. A value that is not a finite number is null, since JSON
    has neither NaN nor infinities; an array becomes nested lists. Every line is in the file when `write` returns.
    Loggers get the single values that are not null, and those of each layer; see loggers/logger.py.

    Args:
      run_dir: exists already; local or gs://.
      resume_step: the step training goes on from: what was recorded of later steps stays in the file, superseded.
        None: the run begins, and all that was recorded before is superseded.
      loggers: by what they are called in messages.
      config: of the run, for the loggers.
      enabled: False in all processes but one: then nothing is written.

    Raises:
      MissingExtraError: access to gs:// is not installed.
      UserError: metrics.jsonl cannot be written; then nothing was written.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        *,
        resume_step: int | None,
        loggers: Mapping[str, Logger],
        config: RunConfig,
        enabled: bool = True,
    ):
        self._enabled = enabled
        if not enabled:
            return
        run_dir = epath.Path(run_dir)
        self._path = run_dir / NAME
        self._courier = Courier("metrics", seconds=RECORD_SECONDS)
        self._file = self._record(lambda: MetricsFile(run_dir, resume_step=resume_step or 0))
        if resume_step is None and (count := self._file.superseded):
            print(f"{run_dir}: no checkpoint, the run begins again; {NAME} keeps its {count} lines", file=sys.stderr)
        run = _logged_run(run_dir, config, resume_step, self._file.before)
        self._loggers = [_GuardedLogger(name, logger, run) for name, logger in loggers.items()]

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush and release everything."""
        if not self._enabled:
            return
        stopped = kind is not None and issubclass(kind, RunStopped | KeyboardInterrupt)
        how = FINISHED if kind is None else STOPPED if stopped else FAILED
        for logger in self._loggers:
            logger.begin_to_close(how)
        for logger in self._loggers:
            logger.close()
        self._record(self._file.close)
        self._courier.close()

    def write(self, step: int, values: Mapping[str, float | np.ndarray | None]) -> None:
        """Record the values of one step; UserError where metrics.jsonl cannot be written."""
        if not self._enabled:
            return
        entry = {"step": step} | {name: _finite_or_none(value) for name, value in values.items()}
        self._record(lambda: self._file.append(entry))
        known = single_values(entry)
        for logger in self._loggers:
            logger.write([Point(step, known)])

    def _record(self, action: Callable[[], Any]) -> Any:
        """What `action` on metrics.jsonl returns; UserError where it fails or hangs."""
        try:
            return self._courier.call(action)
        except OSError as error:  # TimeoutError is one
            raise UserError(f"{error.filename or self._path}: cannot be written: {error.strerror or error}") from error


class _GuardedLogger:
    """A logger in a thread of its own. Its first failure is said, and it gets nothing more.

    It is started at once and gets what it lacks of the history; nothing here waits before `close`.

    Args:
      name: what it is called in messages.
    """

    def __init__(self, name: str, logger: Logger, run: LoggedRun):
        self._name, self._logger = name, logger
        self._last_steps: Mapping[str, int] = {}
        self._courier = DispensableCourier(
            name, seconds=LOGGER_SECONDS, wait_seconds=LOGGER_WAIT_SECONDS, failed=self._failed
        )
        self._courier.send(lambda: self._start(run))
        for first in range(0, len(run.history), LINES_OF_HISTORY):
            self.write(run.history[first : first + LINES_OF_HISTORY])

    def write(self, points: Sequence[Point]) -> None:
        """Hand over those values that it does not have yet; never waits."""
        self._courier.send(lambda: self._write(points))

    def begin_to_close(self, how: str) -> None:
        """Say how the run ended; never waits."""
        self._courier.send(lambda: self._logger.close(how))

    def close(self) -> None:
        """Wait until everything is handed over, LOGGER_SECONDS at most."""
        self._courier.finish(within=LOGGER_SECONDS)
        self._courier.close()

    def _start(self, run: LoggedRun) -> None:
        self._last_steps = self._logger.start(run)
        if self._logger.url is not None:
            _print_above_bar(f"{self._name}: {self._logger.url}")

    def _write(self, points: Sequence[Point]) -> None:
        for step, values in points:
            new = {name: value for name, value in values.items() if step > self._last_steps.get(name, -1)}
            if new:
                self._logger.write(step, new)

    def _failed(self, error: Exception) -> None:
        with contextlib.suppress(Exception):
            self._logger.abandon()
        went_on = f"the run goes on without it, {NAME} has every number"
        _print_above_bar(f"{self._name}: {reason_of(error)}; {went_on}", is_warning=True)


def _logged_run(directory: epath.Path, config: RunConfig, resume_step: int | None, before: Metrics) -> LoggedRun:
    history = [Point(record["step"], single_values(record)) for record in before.records]
    gone = [Point(record["step"], single_values(record)) for record in before.superseded_records]
    recorded: dict[str, int] = {}
    for point in [*gone, *history]:
        for name in point.values:
            recorded[name] = max(point.step, recorded.get(name, -1))
    return LoggedRun(
        directory=directory,
        name=config.run.name,
        project=config.run.project,
        group=config.run.group,
        tags=config.run.tags,
        config=dataclasses.asdict(config),
        resume_step=resume_step,
        history=history,
        recorded=recorded,
    )


def _print_above_bar(line: str, *, is_warning: bool = False) -> None:
    stream = sys.stderr if is_warning else sys.stdout
    with tqdm.external_write_mode(file=stream):
        print(line, file=stream, flush=True)


def _finite_or_none(value: float | np.ndarray | None) -> float | list | None:
    if isinstance(value, np.ndarray) and value.ndim:
        return [_finite_or_none(part) for part in value]
    if value is None or not math.isfinite(value):
        return None
    return float(value)
