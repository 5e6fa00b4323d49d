"""log.txt: what a run has printed, with times, each process that goes on with it behind the one before.

A process begins with a line `start: {...}`, which says what computes, and ends with `end: finished`,
`end: stopped: WHY` or `end: failed: WHY`; one that was killed has no such line. `hybridnorm runs` reads them
(run_status.py). Nothing here imports JAX.
"""

import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from etils import epath

from hybridnorm_jax.append_only import AppendOnlyFile
from hybridnorm_jax.errors import RunStopped, UserError, first_line, reason_of
from hybridnorm_jax.loggers.logger import FAILED, FINISHED, STOPPED
from hybridnorm_jax.training.courier import DispensableCourier
from hybridnorm_jax.whole_files import is_local

NAME = "log.txt"
START, END = "start: ", "end: "
WRITE_SECONDS = 120.0
# Of what a progress bar draws, a line so often. In a bucket an append uploads more than its bytes, so as rarely.
BAR_SECONDS, UPLOAD_SECONDS = 30.0, 60.0
LONGEST_LINE = 2000
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class TextLog:
    """A context in which what is printed is also kept, and written to <run>/log.txt once `open` says where that is.

    Where the file cannot be written, one line says so and nothing else happens. What is printed before `open` is kept
    until then; without it nothing is written, because a run that is refused changes nothing.

    Args:
      enabled: False in all processes but one.
    """

    def __init__(self, *, enabled: bool = True):
        self._enabled = enabled
        self._lock = threading.RLock()  # a signal's handler may print while the main thread does
        self._held: list[str] = []
        self._file: AppendOnlyFile | None = None
        self._pause, self._next = 0.0, 0.0

    def __enter__(self) -> "TextLog":
        self._streams = sys.stdout, sys.stderr
        if self._enabled:
            if sys.stdout is not None:
                sys.stdout = _CopiedStream(sys.stdout, self._add)  # type: ignore[assignment]
            if sys.stderr is not None:
                sys.stderr = _CopiedStream(sys.stderr, self._add)  # type: ignore[assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _CopiedStream):
                stream.end_line()
        sys.stdout, sys.stderr = self._streams
        if self._file is None:
            return
        if error is not None and not isinstance(error, UserError | RunStopped | KeyboardInterrupt):
            for line in "".join(traceback.format_exception(error)).splitlines():
                self._add(line)
        self._add(END + _end(error))
        self._hand_over(at_once=True)
        self._courier.finish(within=WRITE_SECONDS)
        self._courier.send(self._file.close)
        self._courier.close()

    def open(self, directory: epath.Path, *, about: Mapping[str, Any]) -> None:
        """Write to the log of this run from now on; its `start:` line says this of the process."""
        if not self._enabled:
            return
        with self._lock:
            self._file = AppendOnlyFile(directory / NAME)
            self._courier = DispensableCourier("log", seconds=WRITE_SECONDS, failed=self._failed)
            self._pause = 0.0 if is_local(directory) else UPLOAD_SECONDS
            self._held.insert(0, _stamped(START + json.dumps(about)))
        self._hand_over(at_once=True)

    def _add(self, line: str) -> None:
        """Keep a line; write it if it is time."""
        text = ESCAPES.sub("", line).rstrip()
        with self._lock:
            self._held.append(_stamped(text[:LONGEST_LINE]))
        self._hand_over(at_once=False)

    def _hand_over(self, *, at_once: bool) -> None:
        with self._lock:
            now = time.monotonic()
            if self._file is None or not self._held or not (at_once or now >= self._next):
                return
            data = "".join(self._held).encode(errors="backslashreplace")
            self._held, self._next = [], now + self._pause
            file = self._file
            self._courier.send(lambda: file.append(data))

    def _failed(self, error: Exception) -> None:
        if self._streams[1] is not None:
            print(f"{NAME}: {reason_of(error)}; the run goes on without it", file=self._streams[1], flush=True)


class _CopiedStream:
    """A stream that also hands every line to a function; of what a progress bar draws over, now and then one."""

    def __init__(self, stream: TextIO, add: Callable[[str], None]):
        self._stream, self._add_line = stream, add
        self._line, self._next_of_bar = "", 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream, and keep the lines that end here."""
        written = self._stream.write(text)
        *ended, rest = (self._line + text).split("\n")
        for line in ended:
            self._end(line)
        # What follows the last carriage return is drawn over what stands before it.
        *drawn, self._line = rest.split("\r")
        self._keep_of_bar(drawn)
        return written

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def end_line(self) -> None:
        """Keep what has no end of line."""
        if self._line.strip():
            self._end(self._line)
        self._line = ""

    def _end(self, line: str) -> None:
        *drawn, last = line.split("\r")
        self._keep_of_bar(drawn)
        self._add_line(last)

    def _keep_of_bar(self, drawn: list[str]) -> None:
        shown = [text for text in drawn if ESCAPES.sub("", text).strip()]
        if shown and time.monotonic() >= self._next_of_bar:
            self._next_of_bar = time.monotonic() + BAR_SECONDS
            self._add_line(shown[-1])


def _end(error: BaseException | None) -> str:
    if error is None:
        return FINISHED
    if isinstance(error, RunStopped | KeyboardInterrupt):
        return f"{STOPPED}: {first_line(error).removeprefix('stopped ')}"
    reason = first_line(error)
    return f"{FAILED}: {reason if isinstance(error, UserError) else f'{type(error).__name__}: {reason}'}"


def _stamped(line: str) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n"
