"""The arguments FILE ... and data.KEY=value of commands that read text without a run."""

from collections.abc import Sequence
from typing import NamedTuple

from hybridnorm_jax.commands.syntax import SYNTAX
from hybridnorm_jax.config.arguments import read
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.text.sources import Corpus, section_corpus
from hybridnorm_jax.errors import UserError

STDLIB = "stdlib"
FILES_HELP = "text, as data.files names it; or the word stdlib: the standard library of this Python"


class Arguments(NamedTuple):
    """The arguments of a command: its files and options, and the key=value that it takes."""

    others: list[str]
    keys: list[str]


def sort(command: str, arguments: Sequence[str]) -> Arguments:
    """Tell the keys that a command takes from its other arguments."""
    known = SYNTAX[command].keys
    keys = [argument for argument in arguments if "=" in argument and argument.partition("=")[0] in known]
    return Arguments([argument for argument in arguments if argument not in keys], keys)


def text_section(files: Sequence[str], keys: Sequence[str], **others: str) -> DataSection:
    """The data section that these files and keys make.

    Raises:
      ConfigError: a value that cannot be.
    """
    settings = {path.removeprefix("data."): value for path, value in read([], keys).items()}
    source = {"source": STDLIB} if list(files) == [STDLIB] else {"source": "text", "files": tuple(files)}
    return DataSection(**(settings | source | others))


def corpus_of(section: DataSection) -> Corpus:
    """The documents that a section names.

    Raises:
      DataError: a file is not there.
    """
    if STDLIB in section.files:
        raise UserError(f"{STDLIB}: stands alone; name the files of other text in a call of their own")
    return section_corpus(section, "FILE")
