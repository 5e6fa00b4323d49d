"""The runs of a folder, and the comparisons in it, at a glance. Nothing here imports JAX."""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.run_status import CONFIG, FOREIGN, RunStatus, run_status
from hybridnorm_jax.whole_files import expanded, is_local

COMPARISON = "comparison.json"
# A bucket answers each question slowly, and many at the same time.
THREADS = 32


@dataclasses.dataclass(frozen=True)
class RunGroup:
    """A folder of runs in the folder that is listed, such as a comparison of the lab.

    Attributes:
      name: of the folder; path: the whole of it.
      is_comparison: whether the lab made it.
      runs: in it.
    """

    name: str
    path: str
    is_comparison: bool
    runs: tuple[RunStatus, ...]

    @property
    def written(self) -> float | None:
        """When one of the runs last wrote something."""
        return max((run.written for run in self.runs if run.written is not None), default=None)

    @property
    def statuses(self) -> dict[str, int]:
        """Status -> how many of the runs have it, the most frequent first."""
        return dict(collections.Counter(run.status for run in self.runs).most_common())

    @property
    def best(self) -> RunStatus | None:
        """The run with the lowest validation loss."""
        scored = [run for run in self.runs if validation_loss(run) is not None]
        return min(scored, key=lambda run: _or_last(validation_loss(run)), default=None)

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "kind": "comparison" if self.is_comparison else "folder",
            "name": self.name,
            "path": self.path,
            "statuses": self.statuses,
            "best": None if self.best is None else self.best.name,
            "written": self.written,
            "runs": [run.as_json() for run in self.runs],
        }


Listed = RunStatus | RunGroup


def list_runs(folder: str) -> list[Listed]:
    """All directories in a folder: runs, folders of runs, and what is neither; the folder itself, where it is a run.

    Raises:
      UserError: there is no such folder.
    """
    directory = named_directory(folder)
    if not directory.exists() or not directory.is_dir():
        raise UserError(
            f"{folder}: {'no directory' if directory.exists() else 'no such directory'}; name one with runs"
        )
    if (directory / CONFIG).exists():
        return [run_status(directory)]
    inside = _directories(directory)
    if is_local(directory):
        return [_listed(path) for path in inside]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_listed, inside))


def named_directory(path: str) -> epath.Path:
    """The directory that a user names; UserError where that cannot be one."""
    if not path:
        raise UserError("'': an empty name; name a directory")
    try:
        return epath.Path(expanded(path))
    except KeyError as error:  # an address of a kind that etils does not know
        raise UserError(f"{path}: must be a directory of this machine, or begin with gs://") from error


def validation_loss(run: RunStatus) -> float | None:
    """The newest loss of the first validation set."""
    losses = run.newest.validation or {}
    return next(iter(losses.values()), None)


SORTS: dict[str, Callable[[Listed], Any]] = {
    "age": lambda listed: -(listed.written or 0.0),
    "name": lambda listed: listed.name,
    "scheme": lambda listed: (_of(listed, "scheme") or "~", listed.name),
    "status": lambda listed: (_of(listed, "status") or "~", listed.name),
    "step": lambda listed: -(-1 if isinstance(listed, RunGroup) else listed.newest.step or 0),
    "loss": lambda listed: _or_last(None if isinstance(listed, RunGroup) else listed.newest.loss),
    "validation": lambda listed: _or_last(_best_loss(listed)),
}


def _of(listed: Listed, name: str) -> str | None:
    return None if isinstance(listed, RunGroup) else getattr(listed, name)


def _best_loss(listed: Listed) -> float | None:
    run = listed.best if isinstance(listed, RunGroup) else listed
    return None if run is None else validation_loss(run)


def _or_last(value: float | None) -> float:
    """A number to sort by: what is unknown or not finite comes last."""
    return math.inf if value is None or not math.isfinite(value) else value


def _listed(directory: epath.Path) -> Listed:
    status = run_status(directory)
    if status.status != FOREIGN:
        return status
    try:
        inside = [path for path in _directories(directory) if (path / CONFIG).exists()]
        is_comparison = (directory / COMPARISON).exists()
    except OSError:
        return status
    if not inside and not is_comparison:
        return status
    return RunGroup(directory.name, os.fspath(directory), is_comparison, tuple(map(run_status, inside)))


def _directories(directory: epath.Path) -> list[epath.Path]:
    """Those in a directory whose names are not hidden, by name."""
    found: Iterable[epath.Path]
    if is_local(directory):
        with os.scandir(directory) as entries:
            found = [directory / entry.name for entry in entries if entry.is_dir()]
    else:
        found = [path for path in directory.iterdir() if path.is_dir()]
    return sorted(path for path in found if not path.name.startswith("."))
