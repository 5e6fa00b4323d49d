"""What several commands need: how this program is called again, and options that end in one line where wrong."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hybridnorm_jax.errors import UserError


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
