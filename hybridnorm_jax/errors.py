"""What ends a command early and is no fault of the program: what the caller can mend, and being told to stop.

The message of each is one line. It names the key or the file and says what would be right.
"""

import difflib
import signal
import textwrap
from collections.abc import Iterable

# EX_TEMPFAIL of sysexits.h: "the user is invited to retry". Not 143, which a second SIGTERM gives: nothing saved then.
REQUEUE = 75
# A shell loop that requeues must not go on after Ctrl-C.
INTERRUPTED = 130
# 128 + SIGHUP, as of a program that this signal ends: the terminal is closed, and nothing starts the run again.
HUNG_UP = 129
EXIT_CODES = {signal.SIGTERM: REQUEUE, signal.SIGINT: INTERRUPTED, signal.SIGHUP: HUNG_UP}
CAUSES = {
    REQUEUE: "SIGTERM or a preemption notice",
    INTERRUPTED: "SIGINT",
    HUNG_UP: "SIGHUP, the end of its terminal",
}


# Names of keys and the like are shorter.
LONGEST_WORD = 100
# Of a message. What is longer came with the input, such as a line of a file that is quoted.
LONGEST_LINE = 1000
# Of what an error of a service says.
REASON_CHARACTERS = 300


def one_line(text: str) -> str:
    """The text without what would break a line or confuse a terminal: such characters are written as in Python."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason_of(error: BaseException) -> str:
    """In one line, what went wrong and with which file; the name of the error's kind where it says nothing.

    Lines of a long message follow each other, and its end is left out.
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return textwrap.shorten(str(error), REASON_CHARACTERS, placeholder=" ...") or type(error).__name__


class UserError(ValueError):
    """What the caller can mend; its message is one line, whatever a file or an argument puts into it."""

    def __init__(self, message: str):
        line = one_line(message)
        if len(line) > LONGEST_LINE:
            line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
        super().__init__(line)

    @property
    def may_be_of_this_host_alone(self) -> bool:
        """Whether other hosts of the run may not have it: a file, a package or the system has caused it.

        Code that turns such an error into a UserError says `raise UserError(...) from error`.
        """
        return self.__cause__ is not None


class ConfigError(UserError):
    """A configuration that cannot be."""


class DataError(UserError):
    """Data that cannot be used."""


class MissingExtraError(UserError):
    """A package is not installed that one of this library's extras brings."""

    def __init__(self, asked: str, extra: str):
        super().__init__(f"{asked}: needs the extra `{extra}`: pip install 'hybridnorm-jax[{extra}]'")


class RunStopped(BaseException):
    """The run ends here because it was told to; no error, so that nothing on the way takes it for one.

    Attributes:
      exit_code: of the process: a key of CAUSES.
    """

    def __init__(self, exit_code: int, outcome: str):
        super().__init__(f"stopped by {CAUSES[exit_code]}: {outcome}; the same command goes on")
        self.exit_code = exit_code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known word is close, otherwise `; known: ...`."""
    known = sorted(known)
    # Of a long word difflib would think for minutes.
    close = difflib.get_close_matches(str(word)[:LONGEST_WORD], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
