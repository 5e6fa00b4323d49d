"""The directories of checkpoints: what their names say, and which are whole, left over or damaged.

A step is a directory such as <run>/checkpoints/000500. Its `state` holds the arrays; the data iterator's state and the
configuration are Orbax's custom metadata. Orbax marks what it has committed with commit_success.txt; then follows a
manifest of digests (manifest.py), and only with all of its parts is the step complete. A save that is running, or was
killed, lacks one of them, and is 000500.orbax-checkpoint-tmp on a file system until it is committed. The metadata
promise the manifest, so that a step of a version that wrote none, which is used with a warning, is told from a killed
save. What is damaged, or is in the way of a save and is no leftover of one, is kept as 000500.damaged, which nothing
deletes or reads. Other names in the directory are nobody's business here.
"""

import json
import os
import re

from etils import epath

from hybridnorm_jax.errors import MissingExtraError, UserError
from hybridnorm_jax.training import manifest
from hybridnorm_jax.whole_files import expanded, is_local

# Written last by Orbax, before the rename on a file system and instead of it on an object store.
COMMITTED = "commit_success.txt"
METADATA = "_CHECKPOINT_METADATA"
# The key in Orbax's custom metadata that promises a manifest; its value is the number of parts.
PARTS = "manifest_parts"
# What Orbax appends to the name of a step on a file system until it is committed.
UNCOMMITTED = ".orbax-checkpoint-tmp"
STEP_NAME = re.compile(rf"(\d{{6,18}})({re.escape(UNCOMMITTED)})?", re.ASCII)
AT_STEP = re.compile(r"(.+)@(\d{1,18})/?", re.ASCII)


class CheckpointError(UserError):
    """A checkpoint that cannot be found, read, written, or used for this model."""


def find_checkpoint(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """(directory for `Checkpoints`, step) of a run's directory, its checkpoints directory, or one step's directory.

    RUN@STEP stands for RUN/checkpoints/STEP. The step is None, the newest, unless one is named.

    Raises:
      CheckpointError: there is nothing of the kind.
      MissingExtraError: it is in a bucket, and what reaches it is not installed.
    """
    try:
        return _find(path)
    except ImportError as error:  # what etils needs for gs://
        raise MissingExtraError(os.fspath(path), extra="tpu") from error


def _find(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    at_step = AT_STEP.fullmatch(str(path))
    path = absolute(path)
    if at_step is not None and not path.exists():
        directory, newest = _find(at_step[1])
        if newest is not None:
            raise CheckpointError(f"{path}: {at_step[1]} is one checkpoint already; name it without @{at_step[2]}")
        step = directory / f"{int(at_step[2]):06d}"
        if not step.is_dir():
            there = sorted(number for child in directory.iterdir() if (number := complete_step(child)) is not None)
            right = f"there are {', '.join(map(str, there))}" if there else "there is none"
            raise CheckpointError(f"{path}: {at_step[1]} has no checkpoint of step {int(at_step[2])}; {right}")
        return _find(step)
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    if (step := complete_step(path)) is not None:
        return path.parent, step
    if path.is_dir() and any(complete_step(child) is not None for child in path.iterdir()):
        return path, None
    problem = "no complete checkpoint there" if path.is_dir() else "no such directory"
    right = "give a run's directory, or one step's such as RUN/checkpoints/000500 or RUN@500"
    raise CheckpointError(f"{path}: {problem}; {right}")


def absolute(path: epath.PathLike) -> epath.Path:
    """What Orbax wants. resolve() and absolute() of etils would put the working directory before gs://."""
    text = expanded(path)
    try:
        path = epath.Path(text)
    except KeyError as error:  # an address of a kind that etils does not know
        raise CheckpointError(f"{text}: must be a directory of this machine, or begin with gs://") from error
    return path if path.is_absolute() else path.resolve()


def named_step(path: epath.Path) -> int | None:
    """The step that a name says, complete or not; None for a name that is no step's, such as 0000500."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match is not None and match[1] == f"{int(match[1]):06d}" else None


def complete_step(path: epath.Path) -> int | None:
    """The step whose complete checkpoint this directory is, or None."""
    step = named_step(path)
    if step is None or not path.name.isdecimal():
        return None
    # A manifest is complete only after Orbax has committed: without its mark the step is damaged, and is named so when
    # it is verified. Only a step of a version without manifests may lack one.
    # Orbax's mark is looked for last, since a deletion that is going on takes it before the metadata.
    complete = manifest.is_complete(path) or (not _promises_manifest(path) and (path / COMMITTED).exists())
    return step if complete else None


def check_place(directory: epath.Path) -> None:
    """Raise CheckpointError for a path that Orbax would read as a pattern, and not find its files there."""
    if pattern := next((character for character in "*?[" if character in str(directory)), None):
        raise CheckpointError(f"{directory}: checkpoints cannot be in a path with {pattern} in it; choose another")


def is_leftover(path: epath.Path) -> bool:
    """Whether something incomplete is what a killed save or deletion leaves: Orbax had not committed, or had just.

    On a file system that has another name than a step until it is committed (see `delete`). So what has the name of a
    step there, and neither mark nor manifest, is not ours: a copy that is not whole, or somebody's directory.
    """
    if not path.name.isdecimal() or manifest.is_unfinished(path):
        return path.is_dir()
    if is_local(path):
        return False
    return path.is_dir() and not (path / COMMITTED).exists() and not manifest.has_lost_parts(path)


def _promises_manifest(path: epath.Path) -> bool:
    try:
        return PARTS in json.loads((path / METADATA).read_bytes())["custom_metadata"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return False  # damaged; `_saved` says so to who wants to read it


def set_aside(path: epath.Path) -> None:
    """Rename it to such as 000500.damaged, or 000500.damaged-2."""
    if not path.exists():
        return
    number = 1
    while (target := path.parent / f"{path.name}.damaged{'' if number == 1 else f'-{number}'}").exists():
        number += 1
    path.rename(target)


def delete(path: epath.Path) -> None:
    """Delete a step, or what a killed save has left, so that a deletion that is killed leaves no damaged checkpoint."""
    if is_local(path) and path.name.isdecimal():
        # By its name it is a leftover from then on.
        leftover = path.parent / f"{path.name}{UNCOMMITTED}"
        if leftover.exists():
            leftover.rmtree()
        path = path.rename(leftover)
    else:
        # A bucket renames nothing. The manifest before Orbax's mark: a step that lacks its mark alone is damaged.
        manifest.remove(path)
        (path / COMMITTED).unlink(missing_ok=True)
    path.rmtree()
