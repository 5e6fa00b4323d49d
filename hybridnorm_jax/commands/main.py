"""`hybridnorm COMMAND ...`: finds the command, and turns the way it ends into an exit status."""

import contextlib
import dataclasses
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from hybridnorm_jax.errors import INTERRUPTED, REQUEUE, RunStopped, UserError, did_you_mean

if TYPE_CHECKING:
    from hybridnorm_jax.mesh.processes import Processes


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
      arguments, meaning: what --help shows of it.
      has_processes: whether several processes can run it together; its function then gets them as second argument.
      requeue: whether a scheduler that ends it early should start it again.

    It is the function `run(arguments)` of the module of its name in hybridnorm_jax.commands, which returns an exit
    status; None is 0.
    """

    arguments: str
    meaning: str
    has_processes: bool = False
    requeue: bool = False


COMMANDS = {
    "train": Command("[CONFIG ...] [key=value ...]", "pretrain a model, or go on with a run", True, requeue=True),
    "eval": Command("RUN_DIR [key=value ...]", "score a run on its validation sets", True),
    "convert": Command(
        "CHECKPOINT_DIR OUT_DIR --form FORM", "make a Pre-LN model cheaper, and prove that it is the same"
    ),
    "plan": Command("CONFIG [key=value ...]", "say whether a run fits on devices that are not here"),
    "lab": Command("signal | compare | report", "compare norm placements", True),
    "schemes": Command("[SCHEME ...] [DEPTH]", "print norm placements as tables"),
    "completion": Command("bash | zsh | fish", "print a script with which the shell completes commands and keys"),
}

USAGE = """usage: hybridnorm COMMAND [ARGUMENT ...]

{commands}

CONFIG is the name of a configuration that comes with the package ({names}),
or the path of a YAML file. key=value sets one key, such as train.steps=20; `hybridnorm train --help` lists all.
`hybridnorm COMMAND --help` says more about one command.

Status: 0 done; 2 an error, in one line; 75 told to stop (SIGTERM) and saved: run the same command again; 130 the same
by Ctrl-C; 76 stalled (train.stall_exit)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hybridnorm` with these arguments (None: the process's own); returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"hybridnorm {metadata.version('hybridnorm-jax')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"error: {name}: no such command{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    with _signals_end_it_at_once(requeue=command.requeue):
        module = importlib.import_module(f"hybridnorm_jax.commands.{name}")
        if not command.has_processes:
            return exit_status(lambda: module.run(rest))
        from hybridnorm_jax.mesh.processes import Processes  # imports JAX, which other commands need later or never

        processes = Processes(rest)
        return processes.supervise(lambda: exit_status(lambda: module.run(rest, processes), processes))


def usage() -> str:
    """What `hybridnorm --help` prints."""
    from hybridnorm_jax.config import configurations

    rows = [(f"{name} {command.arguments}", command.meaning) for name, command in COMMANDS.items()]
    width = max(len(call) for call, _ in rows)
    commands = "\n".join(f"  {call:{width}}  {meaning}" for call, meaning in rows)
    return USAGE.format(commands=commands, names=", ".join(configurations.names()))


def exit_status(command: Callable[[], int | None], processes: "Processes | None" = None) -> int:
    """What `command` returns; or, after one line on standard error, 2 for what the caller can mend, and RunStopped's.

    Args:
      processes: of several, only those that Processes.speaks lets speak print the line.
    """

    def say(error: BaseException, line: str) -> None:
        if processes is None:
            print(line, file=sys.stderr)
        elif processes.speaks(error):
            print(processes.label(line), file=sys.stderr)

    try:
        return command() or 0
    except UserError as error:
        say(error, f"error: {error}")
        return 2
    except RunStopped as stopped:
        say(stopped, str(stopped))
        return stopped.exit_code
    except OSError as error:
        if error.strerror is None or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        say(error, f"error: {error.filename or 'writing a file'}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


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
