"""A thread that says where a run hangs."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import jax
from etils import epath

from hybridnorm_jax.append_only import AppendOnlyFile
from hybridnorm_jax.training.time_ledger import TimeLedger

# The exit status of a process that train.stall_exit=true ends.
STALLED = 76
# What a phase waits for. Start-up and compilation may take as long as they do.
AWAITED = {
    "input": "no input batch has come",
    "steps": "no device step has completed",
    "checkpoint": "saving a checkpoint has not returned",
    "evaluation": "no evaluation batch has completed",
}
LONGEST_PAUSE = 1.0


class Watchdog:
    """A context in which a phase of `ledger` that lasts too long is reported, once until the ledger goes on.

    The report goes to standard error and is added to <run>/stalls.txt (process P of several: stalls-P.txt): one line
    that says what does not come, and the stacks of all threads.

    Args:
      seconds: how long one wait may take; None: nothing is watched.
      run_dir: exists already; local or gs://.
      where: says how far the run is, for the report, such as "after step 12".
      end: end the process with STALLED after the report. Nothing is saved: the main thread hangs.
    """

    def __init__(
        self,
        ledger: TimeLedger,
        seconds: float | None,
        run_dir: epath.Path,
        *,
        where: Callable[[], str],
        end: bool = False,
    ):
        self._ledger, self._seconds, self._where, self._end = ledger, seconds, where, end
        number = jax.process_index()
        self._file = AppendOnlyFile(run_dir / ("stalls.txt" if jax.process_count() == 1 else f"stalls-{number}.txt"))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._seconds is not None:
            self._thread.join(LONGEST_PAUSE)  # a file system may hang while it writes a report
            self._file.close()

    def _watch(self) -> None:
        reported = None
        while not self._over.wait(min(LONGEST_PAUSE, self._seconds / 4)):
            current = self._ledger.current
            phase, since = current
            if phase in AWAITED and current != reported and time.perf_counter() - since > self._seconds:
                self._report(phase)
                reported = current
                if self._end:
                    os._exit(STALLED)

    def _report(self, phase: str) -> None:
        limit = f"train.stall_seconds={self._seconds:g}"
        line = f"stalled {self._where()}: {AWAITED[phase]} for {limit}, process {jax.process_index()}"
        text = f"{line}\n{time.strftime('%Y-%m-%d %H:%M:%S')}\n{_stacks()}\n"
        print(text, file=sys.stderr, flush=True)
        # After standard error: the file system may be what hangs.
        try:
            self._file.append(text.encode())
        except OSError as error:
            print(f"{error.filename}: cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def _stacks() -> str:
    """The Python stacks of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
