"""Which options and keys each command takes, and what is said of one that belongs to another command."""

import dataclasses
import difflib
import re
from collections.abc import Sequence

from hybridnorm_jax.config.key_lookup import FIELDS, SECTIONS, nearest_key
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.errors import UserError, did_you_mean

HELP = ("--help", "-h")


@dataclasses.dataclass(frozen=True)
class Syntax:
    """What a command takes.

    Attributes:
      options: its own, with their dashes; --help is everybody's.
      keys: its own, which hold for no run; those of `lab` are the fields of its dataclasses of options. And PLUGINS,
        where it is the only one of a run's that the command takes.
      takes_run_keys: whether it takes the keys of `hybridnorm train` as well.
    """

    options: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    takes_run_keys: bool = False


_OF_A_COMPARISON = (
    "schemes",
    "variants",
    "seeds",
    "learning_rates",
    "sweep",
    "sweep_seeds",
    "tokens",
    "flops",
    "together",
)
# Keys of a run that say how text is read.
_OF_TEXT = (
    "data.text_field",
    "data.records",
    "data.chat_template",
    "data.filter",
    "data.separator",
    "data.validation_fraction",
)
SYNTAX = {
    "train": Syntax(options=("--dry-run",), takes_run_keys=True),
    "eval": Syntax(options=("--tasks", "--limit", "--plain", "--json"), takes_run_keys=True),
    "generate": Syntax(
        options=(
            "--prompt",
            "--file",
            "--max-tokens",
            "--temperature",
            "--top-k",
            "--top-p",
            "--min-p",
            "--repetition-penalty",
            "--seed",
            "--stop",
            "--tokenizer",
            "--chat-template",
            "--plain",
            "--json",
        ),
        keys=(PLUGINS,),
    ),
    "convert": Syntax(options=("--form", "--pad-to", "--dtype", "--text", "--ignore-key", "--plain"), keys=(PLUGINS,)),
    "export": Syntax(options=("--format", "--dtype", "--tokenizer", "--plain", "--license"), keys=(PLUGINS,)),
    "plan": Syntax(
        options=("--topology", "--json", "--table", "--compare", "--search", "--jobs", "--most"), takes_run_keys=True
    ),
    "lab signal": Syntax(
        keys=("schemes", "depths", "initializers", "sequences", "seq_len", "out"),
        takes_run_keys=True,
    ),
    "lab widths": Syntax(
        keys=("schemes", "widths", "updates", "sequences", "seq_len", "out"),
        takes_run_keys=True,
    ),
    "lab compare": Syntax(options=("--emit-jobs", "--only"), keys=_OF_A_COMPARISON, takes_run_keys=True),
    "lab plan": Syntax(keys=_OF_A_COMPARISON, takes_run_keys=True),
    "lab report": Syntax(options=("--speed",), keys=("baseline", PLUGINS)),
    "lab claims": Syntax(keys=("out",)),
    "tokenize": Syntax(
        options=("--tokenizer", "--out", "--processes", "--shard-tokens", "--drop-duplicates"), keys=_OF_TEXT
    ),
    "tokenizer train": Syntax(options=("--vocab-size", "--out"), keys=_OF_TEXT),
    "data inspect": Syntax(options=("--rows", "--seconds"), takes_run_keys=True),
    "runs": Syntax(options=("--sort", "--json")),
    "runs compare": Syntax(options=("--json",)),
    "schemes": Syntax(),
    "completion": Syntax(),
}

# A run has one value of what the lab takes a list of.
OF_ONE_RUN = {
    "schemes": "model.scheme",
    "depths": "model.num_layers",
    "widths": "model.d_model",
    "updates": "train.steps",
    "initializers": "model.initializer",
    "seq_len": "train.seq_len",
    "seeds": "train.seed",
    "learning_rates": "optimizer.learning_rate",
}


def check_syntax(command: str, arguments: Sequence[str]) -> None:
    """Refuse an option that `command` does not have, and a key that is another command's.

    What is no command's key is left to those who read the keys, and say which one is meant.

    Raises:
      UserError: names the argument and the command that takes it.
    """
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_number = re.fullmatch(r"-\d+", argument) is not None
        if argument.startswith("-") and not is_number:
            _check_option(command, argument, name)
        elif equals:
            _check_key(command, argument, name)


def _check_option(command: str, argument: str, name: str) -> None:
    own = SYNTAX[command].options
    if name in own or argument in HELP:
        return
    owners = [other for other, syntax in SYNTAX.items() if name in syntax.options]
    if owners:
        raise UserError(f"{name}: an option of {_calls(owners)}, not of {_calls([command])}")
    known = [*own, "--help"]
    right = did_you_mean(name, known)
    key = nearest_key(name.lstrip("-")) if SYNTAX[command].takes_run_keys else None
    if key is not None and not difflib.get_close_matches(name, known):
        right = f"; a key has no dashes: {key}=..."
    raise UserError(f"{argument}: no such option of {_calls([command])}{right}")


def _check_key(command: str, argument: str, name: str) -> None:
    syntax = SYNTAX[command]
    if name in syntax.keys:
        return
    in_section = name.partition(".")[0] in SECTIONS and "/" not in name
    is_run_key = name in FIELDS or in_section
    if is_run_key and not syntax.takes_run_keys:
        own = f"; its own are {', '.join(syntax.keys)}" if syntax.keys else ""
        raise UserError(f"{argument}: a key of {_calls(['train'])}, not of {_calls([command])}{own}")
    owners = [other for other, syntax in SYNTAX.items() if name in syntax.keys]
    if owners and not is_run_key:
        instead = f"; it takes {OF_ONE_RUN[name]}=..." if syntax.takes_run_keys and name in OF_ONE_RUN else ""
        raise UserError(f"{argument}: a key of {_calls(owners)}, not of {_calls([command])}{instead}")


def _calls(commands: Sequence[str]) -> str:
    *others, last = (f"`hybridnorm {command}`" for command in commands)
    return f"{', '.join(others)} and {last}" if others else last
