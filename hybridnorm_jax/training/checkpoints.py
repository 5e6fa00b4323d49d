"""Checkpoints of a run: what is saved, when it is complete, and what is deleted. saved_steps.py reads them.

step_directories.py says how a step lies in its directory. These three files alone know Orbax, whose names still move.
"""

import contextlib
import dataclasses
import errno
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from hybridnorm_jax.training import manifest
from hybridnorm_jax.training.orbax_log import quiet_orbax
from hybridnorm_jax.training.saved_steps import STATE, SavedSteps, innermost_reason
from hybridnorm_jax.training.step_directories import PARTS, CheckpointError, delete, set_aside

# Orbax lets every replica of an array write a part of it, and compiles a slice for each shape and each replica. That is
# worth it for large parts alone; of a small model the slices took longer to compile than all of it to write.
SMALLEST_PART = 2**20  # bytes


class Checkpoints(SavedSteps):
    """The checkpoints of a run that saves; a context manager that waits for the running save at its end.

    With several processes process 0 alone deletes.

    Args:
      directory: made by the first save.
      keep: how many of the newest steps are kept, at least 1.

    Attributes:
      blocked_seconds: how long the last `save` kept its caller; None before the first.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int):
        super().__init__(directory)
        self._keep = keep
        self.blocked_seconds: float | None = None
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

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: dict,
        config_yaml: str,
        plugins: Sequence[dict[str, Any]] = (),
        skipped_in_a_row: int = 0,
        wait: bool = False,
    ) -> None:
        """Save asynchronously, then delete all but the `keep` newest steps; nothing if `step` is complete already.

        While steps are skipped, the newest step that was saved before the last one that was made is kept besides.

        The arrays may be donated as soon as this returns. A save still running is waited for first, so none is dropped.

        Args:
          state: pytree of jax.Array; with several processes none of them on one device only.
          data_state: JSON, the same in every process.
          config_yaml: the resolved configuration.
          plugins: the run's plugins with their sources, as config.plugins.to_json gives them.
          skipped_in_a_row: how many of the newest steps, up to this one, were skipped.
          wait: return only when the checkpoint is complete.

        Raises:
          CheckpointError: this save, or the one before it, failed; what was complete stays so.
        """
        begin = time.perf_counter()
        try:
            self.wait()
            if step not in self.steps():
                metadata = {
                    "data_state": data_state,
                    "config_yaml": config_yaml,
                    "plugins": list(plugins),
                    PARTS: jax.process_count(),
                }
                last_made = step - skipped_in_a_row
                with contextlib.ExitStack() as quiet, self._saving(step):
                    quiet.enter_context(quiet_orbax())
                    self._set_damaged_aside()
                    self._delete_leftovers()
                    path = self._path(step)
                    with _saving_context():
                        saved = {STATE: _present_parts(state)}
                        pending = ocp.save_checkpointables_async(path, saved, custom_metadata=metadata)
                    self._running = self._thread.submit(self._finish, step, last_made, pending, quiet.pop_all())
            if wait:
                self.wait()
        finally:
            self.blocked_seconds = time.perf_counter() - begin

    def wait(self) -> None:
        """Until no save is running; raises CheckpointError if it failed."""
        running = self._running
        self._running = None
        if running is not None:
            running.result()

    def raise_if_failed(self) -> None:
        """Raise the CheckpointError of a save that has failed by now; never waits."""
        if self._running is not None and self._running.done():
            self.wait()

    def close(self) -> None:
        """wait(), and release the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _finish(self, step: int, last_made: int, pending: Any, quiet: contextlib.ExitStack) -> None:
        """In the background: complete a save, then delete what is too old."""
        path, index = self._path(step), jax.process_index()
        with quiet, self._saving(step):
            pending.result()  # after Orbax's barrier, so that all processes see one and the same list of files
            # Until all parts are there: this process might take for a leftover what another one has yet to finish.
            manifest.write_all_parts(path, index=index, count=jax.process_count())
            if index == 0:
                self._rotate(step, last_made)

    def _rotate(self, step: int, last_made: int) -> None:
        """Delete all but the newest steps, and the one to go back to while steps fail."""
        steps = self.steps()
        # The parameters of the steps from `last_made` on are those that steps fail with.
        good = max((old for old in steps if old < last_made), default=None) if last_made < step else None
        for old in steps[: -self._keep]:
            if old != good:
                delete(self._path(old))

    def _set_damaged_aside(self) -> None:
        """Make room for steps that were passed over, or are in the way and no leftovers, to be saved again."""
        in_the_way = self._damaged | set(self._incomplete())
        self._damaged.clear()
        if jax.process_index() == 0:
            for step in sorted(in_the_way):
                set_aside(self._path(step))

    def _delete_leftovers(self) -> None:
        """Remove what killed saves and deletions left. Never while reading: a save that is running looks the same."""
        if jax.process_index() == 0:
            for path in self._leftovers():
                delete(path)

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """Turn what goes wrong while `step` is written into one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore's errors are ValueErrors, whatever the cause
            reason = "no space left on device" if _is_no_space(error) else innermost_reason(error)
            complete = ", ".join(map(str, self.steps())) or "none"
            with contextlib.suppress(OSError):  # Orbax's other threads may still write there
                self._delete_leftovers()
            message = f"saving step {step} failed: {reason}; complete steps, unharmed: {complete}"
            raise CheckpointError(f"{self.directory}: {message}") from error


def _present_parts(state: Any) -> Any:
    """A state without the fields that are None: Orbax would enter them, and other programs' readers would see them."""
    if not dataclasses.is_dataclass(state):
        return state
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if part is not None}


def _is_no_space(error: BaseException) -> bool:
    # TensorStore gives the text only.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _saving_context() -> ocp.Context:
    """How Orbax saves: as by default, but replicas share the writing of large arrays only."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_PART
    return context
