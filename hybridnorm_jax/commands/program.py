"""What several commands need: how this program is called again, and options that end in one line where wrong."""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from hybridnorm_jax.errors import UserError, did_you_mean


def again(arguments: Sequence[str]) -> str:
    """`hybridnorm ARGUMENTS` as it can be typed here: with its path where it is not on PATH."""
    beside = Path(sys.executable).with_name("hybridnorm")
    if shutil.which("hybridnorm"):
        program = ["hybridnorm"]
    elif beside.is_file():
        program = [os.path.relpath(beside)]
    else:
        program = [sys.executable, "-m", "hybridnorm_jax"]
    return shlex.join([*program, *arguments])


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether help is asked for."""
    return "-h" in arguments or "--help" in arguments


def subcommand(command: str, arguments: Sequence[str], known: Iterable[str], usage: str) -> str | None:
    """The subcommand that the first argument names; None, with the usage printed, where there is none, or for help.

    Raises:
      UserError: it is not known.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return None
    name = arguments[0]
    if name not in known:
        raise UserError(f"{command} {name}: no such command{did_you_mean(name, known)}")
    return name


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """What is inside computes in float64 where it asks for it, in all threads, so that jax.enable_x64 would not do."""
    import jax  # after parsing: JAX takes seconds to import

    was = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", was)


def check_outside(source: str, out: str) -> None:
    """Raise UserError for a new directory in what is only read: a file more would make a checkpoint a damaged one.

    Either without a name is refused as well: it would be the directory that the program was started in.
    """
    for path in (source, out):
        if not path:
            raise UserError("'': an empty name; name a directory")
    inner, outer = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if inner != outer and outer.is_dir() and inner.is_relative_to(outer):
        raise UserError(f"{out}: lies in {source}, which is only read; choose a directory outside of it")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors are UserErrors: one line, status 2. Its help has 80 columns."""

    def __init__(self, prog: str, *, usage: str, description: str):
        # An abbreviation would stop to work on the day that a second option begins like it.
        super().__init__(
            prog, usage=usage, description=description, formatter_class=_help_formatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.prog}: {message}; --help says more")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=80)
