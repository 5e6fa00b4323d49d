"""One malformed input, how a command must end on it, and how it ended."""

import dataclasses
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

# Exit status of a command that took its input and came as far as tracing a program for the devices.
ACCEPTED = 100
REFUSED = 2
SECONDS = 15
# Above what the program holds once it is imported.
BYTES = 2 * 2**30
LONGEST_LINE = 2000
# What a terminal no longer shows: a bar of progress that is wiped away.
WIPED = re.compile(r"[^\n]*\r")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command with an input that it should refuse.

    Attributes:
      kind: what is wrong with the input, for the table.
      arguments: of `hybridnorm`; the current directory is the case's own.
      names: the line of the refusal holds one of these: the key or the file.
      files: path in that directory -> content. A path that is there already is replaced.
      prepare: makes in that directory what `files` cannot say.
      base: the directory to start from, one of templates.py; the same one for many cases.
      refused: whether the input is surely wrong; False: by chance it may be right, and then it may be taken.
    """

    kind: str
    arguments: tuple[str, ...]
    names: tuple[str, ...]
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    base: str = "text"
    refused: bool = True

    def __str__(self) -> str:
        shown = " ".join(_short(ascii(argument)) for argument in self.arguments)
        files = ", ".join(f"{name}={_short(repr(content))}" for name, content in self.files.items())
        return f"[{self.kind}] hybridnorm {shown}" + (f"  with {files}" if files else "")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text)} characters)"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the command ended.

    Attributes:
      status: as os.waitstatus_to_exitcode gives it: negative where a signal ended it.
      error: its standard error.
      seconds, peak: how long it took, and how many bytes it held above the program itself.
      written: files in the directory that were changed, removed or made anew, other than a cache's.
    """

    status: int
    error: str
    seconds: float
    peak: int
    written: tuple[str, ...]


def judge(case: Case, outcome: Outcome) -> str | None:
    """What is wrong with how the command ended; None: nothing."""
    for fault in (_ending(case, outcome), _message(case, outcome), _traces(outcome)):
        if fault is not None:
            return fault
    return None


def _ending(case: Case, outcome: Outcome) -> str | None:
    if outcome.seconds > SECONDS:
        return "hung"
    if "Traceback (most recent call last)" in outcome.error:
        return "traceback"
    if outcome.status < 0:
        return f"ended by {signal.Signals(-outcome.status).name}"
    if outcome.peak > BYTES:
        return "memory"
    if outcome.status in (0, ACCEPTED):
        return "accepted" if case.refused else None
    return None if outcome.status == REFUSED else f"status {outcome.status}"


def _message(case: Case, outcome: Outcome) -> str | None:
    if outcome.status != REFUSED:
        return None
    error = WIPED.sub("", outcome.error)
    if not re.fullmatch(r"error: [^\n]*\n", error):
        return "no line" if not error else "several lines"
    if len(error) > LONGEST_LINE:
        return "endless line"
    if not error.removesuffix("\n").isprintable():
        return "control characters"
    return None if any(name in error for name in case.names) else "not named"


def _traces(outcome: Outcome) -> str | None:
    if outcome.status == REFUSED and outcome.written:
        return f"wrote {os.path.commonpath(outcome.written) or outcome.written[0]}"
    return None
