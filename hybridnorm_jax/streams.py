"""Standard output and standard error: what they can show, and how a program goes on where they go away."""

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class SturdyStream:
    """A stream whose first failure is said on the other one; what is written to it afterwards is dropped.

    A character that its encoding does not have is written as an escape such as \\u2026.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name
        self._is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written; never fails."""
        try:
            if not self._is_lost:
                self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._lose(error)
        except ValueError:  # this process itself has closed it, as it does at its end
            self._is_lost = True
        return len(text)

    def flush(self) -> None:
        """Flush; never fails."""
        try:
            if not self._is_lost:
                self._stream.flush()
        except OSError as error:
            self._lose(error)
        except ValueError:
            self._is_lost = True

    def _lose(self, error: OSError) -> None:
        self._is_lost = True
        drop_output(self._stream)
        reason = error.strerror or str(error)
        other = sys.stderr if self._name == "stdout" else sys.stdout
        if other is not None:
            with contextlib.suppress(OSError, ValueError):
                print(f"{NAMES[self._name]}: {reason}; the command goes on without it", file=other, flush=True)


def drop_output(stream: TextIO) -> None:
    """Let the system drop what is left of a stream, which Python writes when it ends, and complains where it cannot."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def sturdy_streams() -> Iterator[None]:
    """A context in which nothing fails because standard output or standard error cannot be written."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, SturdyStream) or isinstance(sys.stderr, SturdyStream):
        yield
        return
    if sys.stdout is not None:
        sys.stdout = SturdyStream(sys.stdout, "stdout")
    if sys.stderr is not None:
        sys.stderr = SturdyStream(sys.stderr, "stderr")
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def prepare_streams() -> None:
    """Make the three standard streams ones that can be used.

    Each that is closed becomes the null device. Otherwise the next file that is opened gets its number, and what is
    printed is written into that file. A character that standard output cannot encode is written as an escape.
    """
    for number, mode in ((0, "r"), (1, "w"), (2, "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    # In the locale C it is "surrogateescape", which cannot write a character that ASCII lacks either.
    if isinstance(sys.stdout, io.TextIOWrapper) and (sys.stdout.errors == "strict" or not _writes_all(sys.stdout)):
        sys.stdout.reconfigure(errors="backslashreplace")


def _writes_all(stream: io.TextIOWrapper) -> bool:
    """Whether the encoding of a stream has all characters."""
    return codecs.lookup(stream.encoding).name.startswith("utf-")


def can_redraw(stream: TextIO | None) -> bool:
    """Whether a progress bar works there: on a terminal that can move its cursor, not in a file or a pipe."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """As 45 s, 12 min 30 s or 5 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
