"""Checkpoints of a run. The only file that knows Orbax, whose names still move.

A step is a directory such as <run>/checkpoints/000500, complete once commit_success.txt is in it. Its `state` holds
the arrays; the data iterator's state and the configuration are Orbax's custom metadata. A save that is running, or
was killed, is 000500.orbax-checkpoint-tmp on a file system and lacks commit_success.txt on an object store.
"""

import contextlib
import errno
import logging
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from hybridnorm_jax.config import UserError

STATE = "state"
# Written last by Orbax, before the rename on a file system and instead of it on an object store.
COMMITTED = "commit_success.txt"
STEP_NAME = re.compile(r"(\d{6,})(\.orbax-checkpoint-tmp)?")


class CheckpointError(UserError):
    """A checkpoint that cannot be found, read, written, or used for this model."""


class Checkpoints:
    """The checkpoints in one directory, local or gs://; a context manager that waits for the running save at its end.

    With several processes, all of them call every method in the same order; process 0 alone deletes.

    Args:
      directory: made by the first save; reading never changes it.
      keep: how many of the newest steps are kept, at least 1.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int):
        self.directory = _absolute(directory)
        self._keep = keep
        self._running: Future | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    def steps(self) -> list[int]:
        """The complete steps, ascending."""
        found = self.directory.iterdir() if self.directory.exists() else ()
        return sorted(step for path in found if (step := _complete_step(path)) is not None)

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, *, data_state: dict, config_yaml: str, wait: bool = False) -> None:
        """Save asynchronously, then delete all but the `keep` newest steps; nothing if `step` is complete already.

        The arrays may be donated as soon as this returns. A save still running is waited for first, so none is dropped.

        Args:
          step: at least 0.
          state: pytree of jax.Array; with several processes none of them on one device only.
          data_state: JSON, the same in every process.
          config_yaml: the resolved configuration.
          wait: return only when the checkpoint is complete.

        Raises:
          CheckpointError: this save, or the one before it, failed; what was complete stays so.
        """
        self.wait()
        if step not in self.steps():
            with contextlib.ExitStack() as quiet, self._saving(step):
                quiet.enter_context(_quiet())
                self._delete_leftovers()
                pending = ocp.save_checkpointables_async(
                    self._path(step),
                    {STATE: state},
                    custom_metadata={"data_state": data_state, "config_yaml": config_yaml},
                )
                self._running = self._thread.submit(self._finish, step, pending, quiet.pop_all())
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until no save is running; raises CheckpointError if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """wait(), and release the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, data_state) of `step`, bit for bit; None: of the newest.

        Args:
          abstract_state: the state's pytree with a jax.ShapeDtypeStruct, sharding included, for every array. The
            shardings are those of the current mesh, whatever the checkpoint was saved from.

        Raises:
          CheckpointError: no such checkpoint, one of another model, or a damaged one.
        """
        step, metadata = self._metadata(step)
        if list(metadata.metadata) == ["params"]:
            right = "start a new run from it: init_from=THIS_RUN run.name=ANOTHER"
            raise CheckpointError(f"{self._path(step)}: holds parameters alone, no optimizer state; {right}")
        self._check_same_leaves(step, metadata.metadata, abstract_state)
        return self._load(step, abstract_state), metadata.custom_metadata["data_state"]

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """The state's "params" alone, as `restore`; nothing else is read."""
        step, metadata = self._metadata(step)
        self._check_same_leaves(step, {"params": metadata.metadata["params"]}, {"params": abstract_params})
        return self._load(step, {"params": abstract_params})["params"]

    def read_config(self, step: int | None = None) -> str:
        """The configuration that was saved with `step`, as YAML; None: with the newest."""
        return self._metadata(step)[1].custom_metadata["config_yaml"]

    def _path(self, step: int) -> epath.Path:
        return self.directory / f"{step:06d}"

    def _finish(self, step: int, pending: Any, quiet: contextlib.ExitStack) -> None:
        """In the background: complete a save, then delete what is too old."""
        with quiet, self._saving(step):
            pending.result()
            if jax.process_index() == 0:
                for old in self.steps()[: -self._keep]:
                    # Unmarked first, so that a deletion that is killed leaves a leftover and no damaged checkpoint.
                    (self._path(old) / COMMITTED).unlink()
                    self._path(old).rmtree()

    def _delete_leftovers(self) -> None:
        """Remove what killed saves and deletions left. Never while reading: a save that is running looks the same."""
        if jax.process_index() == 0 and self.directory.exists():
            for path in self.directory.iterdir():
                if STEP_NAME.fullmatch(path.name) and _complete_step(path) is None:
                    path.rmtree()

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """Turn what goes wrong while `step` is written into one line."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors, whatever the cause
            reason = "no space left on device" if _is_no_space(error) else _reason(error)
            complete = ", ".join(map(str, self.steps())) or "none"
            with contextlib.suppress(OSError):  # Orbax's other threads may still write there
                self._delete_leftovers()
            message = f"saving step {step} failed: {reason}; complete steps, unharmed: {complete}"
            raise CheckpointError(f"{self.directory}: {message}") from error

    def _metadata(self, step: int | None) -> tuple[int, Any]:
        """The step (None: the newest) and Orbax's metadata of it."""
        self.wait()
        complete = self.steps()
        if not complete:
            raise CheckpointError(f"{self.directory}: no complete checkpoint in it")
        step = complete[-1] if step is None else step
        if step not in complete:
            raise CheckpointError(f"{self.directory}: no complete checkpoint of step {step}; there are {complete}")
        with self._reading(step):
            metadata = ocp.metadata(self._path(step), STATE)
            # Orbax logs unreadable metadata and goes on without it.
            if metadata.metadata is None or not metadata.custom_metadata:
                raise ValueError("its metadata or its index is unreadable")
        return step, metadata

    def _load(self, step: int, abstract: Any) -> Any:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with self._reading(step), context:
            return ocp.load(self._path(step), abstract, checkpointable_name=STATE)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turn what goes wrong while `step` is read into one line."""
        try:
            with _quiet():
                yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # by kind of damage: KeyError, JSONDecodeError, ValueError, a bare Exception, ...
            remedy = "if it is damaged, delete this directory to use the checkpoint before it"
            raise CheckpointError(f"{self._path(step)}: cannot be read ({_reason(error)}); {remedy}") from error

    def _check_same_leaves(self, step: int, saved: Any, expected: Any) -> None:
        """Raise CheckpointError for the first leaf, by path, that is not in both trees with one shape and dtype."""
        saved, expected = _describe(saved), _describe(expected)
        for path in sorted(saved.keys() | expected.keys()):
            has, wanted = saved.get(path, "nothing"), expected.get(path, "nothing")
            if has != wanted:
                message = f"a checkpoint of another model: {path} is {has} there, but this model has {wanted}"
                raise CheckpointError(f"{self._path(step)}: {message}")


def find_checkpoint(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """(directory for `Checkpoints`, step) of a run's directory, its checkpoints directory, or one step's directory.

    The step is None, the newest, unless one is named. Raises CheckpointError where there is nothing of the kind.
    """
    path = _absolute(path)
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    if (step := _complete_step(path)) is not None:
        return path.parent, step
    if path.is_dir() and any(_complete_step(child) is not None for child in path.iterdir()):
        return path, None
    problem = "no complete checkpoint there" if path.is_dir() else "no such directory"
    raise CheckpointError(f"{path}: {problem}; give a run's directory, or one step's such as RUN/checkpoints/000500")


def _absolute(path: epath.PathLike) -> epath.Path:
    """What Orbax wants. resolve() and absolute() of etils would put the working directory before gs://."""
    path = epath.Path(path).expanduser()
    return path if path.is_absolute() else path.resolve()


def _complete_step(path: epath.Path) -> int | None:
    """The step whose complete checkpoint this directory is, or None."""
    match = STEP_NAME.fullmatch(path.name)
    if match is None or match[2] or not (path / COMMITTED).exists():
        return None
    return int(match[1])


def _describe(tree: Any) -> dict[str, str]:
    """{path: "dtype[shape]"}; paths do not tell attributes from keys, since Orbax stores both as keys."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _reason(error: BaseException) -> str:
    """The start of what the innermost error says, without TensorStore's specification of the whole store."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" [tensorstore_spec")[0][:300]


def _is_no_space(error: BaseException) -> bool:
    # TensorStore gives the text only.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


class _OrbaxRecords(logging.Filter):
    """Drops log records that come from Orbax or TensorStore."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "/orbax/checkpoint/" not in record.pathname and "tensorstore" not in record.getMessage()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log: its threads write a page of traceback for each error that is raised here as well."""
    records = _OrbaxRecords()
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(records)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(records)
