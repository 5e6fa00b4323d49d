"""What a run's directory says of it at a glance: how far it is, how it goes, and whether it runs.

Small files and the ends of large ones are read. Nothing here imports JAX, and nothing is locked or written.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from hybridnorm_jax.append_only import existing_parts
from hybridnorm_jax.config.key_lookup import FIELDS, default
from hybridnorm_jax.config.key_values import typed
from hybridnorm_jax.config.yaml_nodes import Scalar, read_yaml
from hybridnorm_jax.errors import ConfigError, first_line
from hybridnorm_jax.loggers.logger import FAILED, FINISHED, STOPPED
from hybridnorm_jax.streams import duration
from hybridnorm_jax.training import lock_holder, metrics_file, text_log
from hybridnorm_jax.training.newest_metrics import Newest, newest_metrics, read_piece
from hybridnorm_jax.whole_files import is_local, size_of

RUNNING, NEVER_STARTED, SAVED, DAMAGED, FOREIGN = "running", "never started", "saved", "damaged", "no run"
CONFIG, RESULT = "config.yaml", "result.json"
# A lock of another machine is fresh while something in the directory was written in these seconds.
FRESH_SECONDS = 900
LOG_BYTES = 8192
LARGEST_FILE = 1_000_000
SCHEME, STEPS = "model.scheme", "train.steps"
TORN = "it was killed, or its machine was lost"


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """A run at a glance.

    Attributes:
      name: of its directory; path: the whole of it.
      status: FINISHED, STOPPED, FAILED, RUNNING, NEVER_STARTED, SAVED (parameters that no training here made),
        DAMAGED or FOREIGN (a directory without a config.yaml).
      why: one line, where there is something to say of the status.
      scheme, steps: of its configuration.
      newest: its newest numbers; the step is that of the result or the newest checkpoint where no line has one.
      written: when its directory was last written to, in seconds since 1970.
    """

    name: str
    path: str
    status: str
    why: str = ""
    scheme: str | None = None
    steps: int | None = None
    newest: Newest = Newest()
    written: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As JSON has it: null for what is unknown or not finite."""
        losses = self.newest.validation or {}
        return {
            "kind": "run",
            "name": self.name,
            "path": self.path,
            "scheme": self.scheme,
            "step": self.newest.step,
            "steps": self.steps,
            "train_loss": _finite(self.newest.loss),
            "validation_loss": {name: _finite(loss) for name, loss in losses.items()},
            "evaluated_step": self.newest.evaluated,
            "tokens_per_second": _finite(self.newest.rate),
            "status": self.status,
            "why": self.why or None,
            "written": self.written,
        }


class _Ending(NamedTuple):
    status: str
    why: str = ""


def run_status(directory: epath.Path) -> RunStatus:
    """The run in a directory; never fails."""
    known = RunStatus(directory.name, os.fspath(directory), DAMAGED)
    try:
        if not (directory / CONFIG).exists():
            return dataclasses.replace(known, status=FOREIGN, why=f"no {CONFIG}")
        scheme, steps = _scheme_and_steps(directory / CONFIG)
        known = dataclasses.replace(known, scheme=scheme, steps=steps)
        files = (metrics_file.NAME, text_log.NAME, lock_holder.NAME, CONFIG)
        parts = {name: existing_parts(directory / name) for name in files}
        times = [_modified(parts[name][-1]) for name in files[:3] if parts[name]] or [_modified(parts[CONFIG][-1])]
        known = dataclasses.replace(known, written=max(times))
        result = _result(directory / RESULT)
        newest = newest_metrics(directory)
        if newest.step is None:
            newest = newest._replace(step=_saved_step(directory))
        ending = _ending(directory, newest, steps, result, known.written)
        return dataclasses.replace(known, status=ending.status, why=ending.why, newest=newest)
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
        return dataclasses.replace(known, why=_reason(error).removeprefix(f"{directory}/"))


def _reason(error: Exception) -> str:
    """What cannot be read, and why."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: cannot be read ({error.strerror})"
    return first_line(error)


def _ending(directory: epath.Path, newest: Newest, steps: int, result: dict[str, Any], written: float) -> _Ending:
    """Whether the run goes on, or how it ended."""
    log = _log_end(directory)
    lock = directory / lock_holder.NAME
    if lock.exists():
        holder = lock.read_bytes()[:LOG_BYTES]
        if (runs := lock_holder.runs_here(holder)) is not None:
            return _Ending(RUNNING) if runs else _Ending(FAILED, TORN)
        silent = time.time() - written
        if silent < FRESH_SECONDS:
            return _Ending(RUNNING, f"{lock_holder.holder_text(holder)}")
        return _Ending(FAILED, f"nothing written for {duration(silent)} by {lock_holder.holder_text(holder)}")
    if result.get("status") == "diverged":
        return _Ending(FAILED, f"diverged at step {result.get('diverged_at')}")
    if result.get("status") == FINISHED:
        return _Ending(FINISHED)
    if log is not None:
        return log
    if not existing_parts(directory / metrics_file.NAME):
        return _Ending(NEVER_STARTED if newest.step is None else SAVED)
    return _Ending(FINISHED if newest.step is not None and newest.step >= steps else STOPPED)


def _log_end(directory: epath.Path) -> _Ending | None:
    """How the newest process of the run ended, as its log says; None where there is no log."""
    parts = existing_parts(directory / text_log.NAME)
    if not parts:
        return None
    size = size_of(parts[-1])
    for line in reversed(read_piece(parts[-1], max(size - LOG_BYTES, 0), size).decode(errors="replace").splitlines()):
        said = line.partition(" ")[2]
        if said.startswith(text_log.END):
            status, _, why = said.removeprefix(text_log.END).partition(": ")
            return _Ending(status, why) if status in (FINISHED, STOPPED, FAILED) else _Ending(FAILED, TORN)
        if said.startswith(text_log.START):
            break
    return _Ending(FAILED, TORN)


def _scheme_and_steps(file: epath.Path) -> tuple[str, int]:
    """Two keys of a configuration. As the program writes it, two lines say them, and a thousand are read at once."""
    if size_of(file) > LARGEST_FILE:
        raise ConfigError(f"{file}: too large for a configuration")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: no text in UTF-8 (byte {error.start})") from error
    sections = {match[1]: match[2] for match in re.finditer(r"^(\w+):\n((?:  .*\n)*)", text, re.MULTILINE)}
    scheme = re.search(r"^  scheme: (\w+)$", sections.get("model", ""), re.MULTILINE)
    steps = re.search(r"^  steps: (\d{1,9})$", sections.get("train", ""), re.MULTILINE)
    if scheme is not None and steps is not None:
        return scheme[1], int(steps[1])
    tree = read_yaml(text, str(file))
    found = []
    for path in (SCHEME, STEPS):
        section, _, name = path.partition(".")
        node = tree.get(section) if isinstance(tree, dict) else None
        value = node.get(name) if isinstance(node, dict) else None
        where = f"{file}: {path}={value.text}" if isinstance(value, Scalar) else f"{file}: {path}"
        found.append(default(FIELDS[path]) if value is None else typed(value, FIELDS[path], where))
    return found[0], found[1]


def _result(file: epath.Path) -> dict[str, Any]:
    """What the lab wrote when the run ended; empty: nothing that can be read."""
    try:
        value = json.loads(file.read_bytes()) if file.exists() else {}
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: cannot be read as JSON") from None
    return value if isinstance(value, dict) else {}


def _saved_step(directory: epath.Path) -> int | None:
    """The newest step of the checkpoints, by their names."""
    folder = directory / "checkpoints"
    names: Iterable[str] = (path.name for path in folder.iterdir()) if folder.exists() else ()
    return max((int(name) for name in names if re.fullmatch(r"\d{6,18}", name)), default=None)


def _modified(path: epath.Path) -> float:
    return os.stat(path).st_mtime if is_local(path) else float(path.stat().mtime)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
