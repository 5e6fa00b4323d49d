"""`hybridnorm COMMAND ...`: finds the command, and turns the way it ends into an exit status."""

import contextlib
import dataclasses
import errno
import importlib
import os
import select
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from hybridnorm_jax.commands.huge_pages import begin_again_with_huge_pages
from hybridnorm_jax.errors import INTERRUPTED, REQUEUE, MissingExtraError, RunStopped, UserError, did_you_mean
from hybridnorm_jax.streams import drop_output, prepare_streams

if TYPE_CHECKING:
    from hybridnorm_jax.mesh.processes import Processes


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: the function `run(arguments)` of the module of its name in hybridnorm_jax.commands.

    The function returns an exit status; None is 0.

    Attributes:
      arguments, meaning: what --help shows of it.
      has_processes: whether several processes can run it together; its function then gets them as second argument.
      requeue: whether a scheduler that ends it early should start it again.
      computes: whether it takes long enough on a CPU that fast memory is worth a second start.
    """

    arguments: str
    meaning: str
    has_processes: bool = False
    requeue: bool = False
    computes: bool = False


# 128 + SIGPIPE, as of a program that this signal ends.
CLOSED_OUTPUT = 141

COMMANDS = {
    "train": Command(
        "[CONFIG ...] [key=value ...]",
        "pretrain a model, or resume a run",
        has_processes=True,
        requeue=True,
        computes=True,
    ),
    "eval": Command("RUN_DIR [key=value ...]", "score a run on its validation sets", has_processes=True, computes=True),
    "generate": Command("RUN_OR_DIR [--prompt TEXT]", "write text with a trained model", computes=True),
    "convert": Command("DIR OUT_DIR --form FORM", "make a Pre-LN model cheaper, proven equal", computes=True),
    "export": Command("RUN OUT_DIR", "write a run's model for PyTorch"),
    "plan": Command("CONFIG [key=value ...]", "say whether a run fits on other devices"),
    "lab": Command("signal | compare | ...", "compare norm placements", has_processes=True, computes=True),
    "tokenize": Command("FILE ... --out DIR", "make tokens ahead of training", requeue=True),
    "data": Command("inspect [key=value ...]", "show data as the model sees them"),
    "tokenizer": Command("train FILE ...", "learn a vocabulary from text"),
    "runs": Command("[DIR] | compare RUN RUN ...", "list runs, or say in what they differ"),
    "schemes": Command("[SCHEME ...] [DEPTH]", "list norm placements, or print some"),
    "completion": Command("bash | zsh | fish", "print a script that completes arguments"),
}

WIDTH = 80
USAGE = """usage: hybridnorm COMMAND [ARGUMENT ...]

{commands}

{names}

key=value sets one key, such as train.steps=20; `hybridnorm train --help` lists
all. `hybridnorm COMMAND --help` says more; `hybridnorm --version` the version.

Exit status:  0  done
              2  an error that you can mend; one line says which
             75  stopped by SIGTERM and saved: the same command goes on
            130  the same by Ctrl-C; 129 the same by the end of the terminal
             76  stalled (train.stall_exit=true)"""


def start(arguments: Sequence[str] | None = None) -> int:
    """`main` as the whole of a process, which may begin once more (huge_pages.py)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS and COMMANDS[arguments[0]].computes:
        begin_again_with_huge_pages()
    return main(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hybridnorm` with these arguments (None: the process's own); returns the exit status."""
    prepare_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    unreadable = next((argument for argument in arguments if not _is_text(argument)), None)
    if unreadable is not None:
        return exit_status(lambda: _refuse_bytes(unreadable))
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    command = COMMANDS.get(name)
    if command is None:
        return exit_status(lambda: _without_command(name))
    with _signals_end_it_at_once(requeue=command.requeue):
        module = importlib.import_module(f"hybridnorm_jax.commands.{name}")
        if not command.has_processes:
            return exit_status(lambda: module.run(rest))
        from hybridnorm_jax.mesh.processes import Processes  # imports JAX, which other commands need later or never

        processes = Processes(rest)
        return processes.supervise(lambda: exit_status(lambda: module.run(rest, processes), processes))


def _is_text(argument: str) -> bool:
    """Whether the system's encoding knew all bytes of an argument: Python stands surrogates for the others."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _refuse_bytes(argument: str) -> int:
    shown = argument.encode("ascii", "backslashreplace").decode()
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("_", "-") == "utf-8":
        raise UserError(f"{shown}: not UTF-8 text; rename what it names, or write it in UTF-8")
    raise UserError(f"{shown}: not text in this environment's encoding, {encoding}; PYTHONUTF8=1 makes it UTF-8")


def _without_command(argument: str) -> int:
    """`hybridnorm`, `hybridnorm --help`, `hybridnorm --version`, or a word that is no command; "" is none."""
    if argument == "--version":
        print(f"hybridnorm {_version()}")
    elif argument in ("", "-h", "--help"):
        print(usage())
    elif argument.startswith("-"):
        raise UserError(f"{argument}: no such option{did_you_mean(argument, ['--help', '--version'])}")
    else:
        raise UserError(f"{argument}: no such command{did_you_mean(argument, COMMANDS)}")
    return 0 if argument else 2


def _version() -> str:
    try:
        return metadata.version("hybridnorm-jax")
    except metadata.PackageNotFoundError as error:
        raise UserError("--version: hybridnorm-jax is imported from a folder and not installed") from error


def usage() -> str:
    """What `hybridnorm --help` prints; it fits a screen of 80 columns."""
    from hybridnorm_jax.config import named_configurations

    calls = {f"{name} {command.arguments}": command.meaning for name, command in COMMANDS.items()}
    width = max(len(call) for call in calls)
    commands = "\n".join(f"  {call:{width}}  {meaning}" for call, meaning in calls.items())
    names = textwrap.fill(f"CONFIG is a YAML file, or one of {', '.join(named_configurations.names())}.", WIDTH)
    return USAGE.format(commands=commands, names=names)


def exit_status(command: Callable[[], int | None], processes: "Processes | None" = None) -> int:
    """What `command` returns; or, after one line on standard error, 2 for what the caller can mend, and RunStopped's.

    Args:
      processes: of several, only those that Processes.speaks lets speak print the line.
    """

    def say(error: BaseException, line: str) -> None:
        if processes is None:
            _complain(line)
        elif processes.speaks(error):
            _complain(processes.label(line))

    try:
        status = _status(command)
        sys.stdout.flush()  # here an error of it can still become a status
        return status
    except UserError as error:
        # What the message quotes, such as an argument, may hold line breaks.
        say(error, f"error: {' '.join(str(error).splitlines())}")
        return 2
    except RunStopped as stopped:
        say(stopped, str(stopped))
        return stopped.exit_code
    except OSError as error:
        if (reason := _output_failure(error)) is not None:
            drop_output(sys.stdout)
            if reason == errno.EPIPE:
                return CLOSED_OUTPUT
            say(error, f"error: standard output: {os.strerror(reason)}")
            return 2
        if error.strerror is None or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        # As a UserError it is one line, whatever the path.
        said = UserError(f"{error.filename or 'writing a file'}: {error.strerror}")
        say(error, f"error: {said}")
        return 2
    except ImportError as error:
        # Of fsspec, wherever the first path in a bucket is read.
        if "gcsfs" not in str(error):
            raise
        say(error, f"error: {MissingExtraError('a path that starts with gs://', extra='tpu')}")
        return 2
    except RuntimeError as error:
        # Of pathlib, wherever a path that starts with ~ is read.
        if "home directory" not in str(error):
            raise
        say(error, "error: a path that starts with ~: this user has no home directory; write the whole path")
        return 2
    except KeyboardInterrupt:
        _complain("\ninterrupted")
        return INTERRUPTED


def _complain(line: str) -> None:
    """Print on standard error, where that is still open: the exit status says the same."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop_output(sys.stderr)


def _status(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except SystemExit as end:  # argparse, after it has printed its help
        return end.code or 0


def _output_failure(error: OSError) -> int | None:
    """The number of an error of standard output, such as EPIPE in `hybridnorm schemes | head -1`; None: of another."""
    if error.filename is not None:
        return None
    try:
        sys.stdout.write("")
        sys.stdout.flush()  # what could not be written is still to be written
    except OSError as again:
        return again.errno
    if not isinstance(error, BrokenPipeError):
        return None
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return errno.EPIPE if closed else None


@contextlib.contextmanager
def _signals_end_it_at_once(*, requeue: bool) -> Iterator[None]:
    """SIGINT, and SIGTERM where a scheduler should `requeue` it, end the process with the status of a later one.

    This is for the seconds in which JAX is imported: a KeyboardInterrupt in its extensions is a traceback, an
    ImportError or a crash. What is ignored stays ignored, and a caller's own handler stays.
    """
    statuses = {signal.SIGINT: INTERRUPTED} | ({signal.SIGTERM: REQUEUE} if requeue else {})
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, status in statuses.items():
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, lambda *_, status=status: os._exit(status))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
