"""How a command line that is being typed may go on; completion.py hands this to the shells.

Nothing here imports JAX: a person waits for the answer.
"""

import os
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from hybridnorm_jax.commands.main import COMMANDS
from hybridnorm_jax.commands.syntax import SYNTAX
from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.data_section import CHATML, PACKINGS, RECORDS, SOURCES, TOKEN_DTYPES
from hybridnorm_jax.config.key_lookup import FIELDS, SECTIONS
from hybridnorm_jax.config.key_values import read_hint
from hybridnorm_jax.config.mixture_section import UNITS
from hybridnorm_jax.config.optimizer_kinds import OPTIMIZERS
from hybridnorm_jax.config.optimizer_section import (
    FALLS,
    MOMENT_DTYPES,
    MUON_DTYPES,
    MUON_SCALES,
    SCHEDULES,
)
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.config.run_config import EQUIVALENT_FORMS, RunSection
from hybridnorm_jax.evaluation.paper_tasks import PAPER, PAPER_TASKS
from hybridnorm_jax.kernels.backend_names import ATTENTION_BACKENDS, EXPERT_DISPATCHES, LOSS_KERNELS
from hybridnorm_jax.lab.claims.claim import read_claims
from hybridnorm_jax.model import config as model
from hybridnorm_jax.model.config_attention import POSITIONS, ROPE_SCALINGS
from hybridnorm_jax.model.config_feed_forward import ACTIVATIONS
from hybridnorm_jax.model.norm_kinds import NORM_KINDS
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.training.run_listing import SORTS

SHELLS = ("bash", "zsh", "fish")
AUTO_OR_BOOL = ("auto", "true", "false")

# The values of keys that hold one of a few words.
CHOICES = {
    "model.scheme": SCHEMES,
    "model.activation": ACTIVATIONS,
    "model.norm": NORM_KINDS,
    "model.attention_norm": ("auto", *(name for name, kind in NORM_KINDS.items() if kind.for_heads)),
    "model.embedding_norm": AUTO_OR_BOOL,
    "model.positions": POSITIONS,
    "model.rope_scaling": ROPE_SCALINGS,
    "model.initializer": ("auto", *model.INITIALIZERS),
    "model.dtype": model.COMPUTE_DTYPES,
    "model.param_dtype": model.PARAM_DTYPES,
    "model.attention": ATTENTION_BACKENDS,
    "model.expert_dispatch": EXPERT_DISPATCHES,
    "model.remat": (*model.REMAT_POLICIES, model.AUTO_REMAT),
    "data.source": SOURCES,
    "data.token_dtype": TOKEN_DTYPES,
    "data.packing": PACKINGS,
    "data.records": RECORDS,
    "data.mixture_unit": UNITS,
    "train.loss_kernel": LOSS_KERNELS,
    "train.equivalent_form": EQUIVALENT_FORMS,
    "optimizer.schedule": SCHEDULES,
    "optimizer.wsd_decay": FALLS,
    "optimizer.name": OPTIMIZERS,
    "optimizer.moment_dtype": MOMENT_DTYPES,
    "optimizer.muon_scale": MUON_SCALES,
    "optimizer.muon_dtype": MUON_DTYPES,
    "distributed.initialize": AUTO_OR_BOOL,
    "baseline": SCHEMES,
}
# The elements of keys that hold a list of them.
CHOICES_OF_LISTS = {
    "schemes": SCHEMES,
    "initializers": ("auto", *model.INITIALIZERS),
}
PATH_KEYS = ("init_from", "run.dir", "data.tokenizer", "data.cache_dir", "out")

# Options whose value is the next argument, and those that are written --option=value.
VALUES_OF_OPTIONS = {
    "--form": ("pre_rmsnorm", "pre_crmsnorm"),
    "--format": ("hf", "safetensors"),
    "--dtype": model.PARAM_DTYPES,
    "--license": (),
    "--pad-to": (),
    "--ignore-key": (),
    "--topology": (),
    "--compare": (),
    "--jobs": (),
    "--most": (),
    "--prompt": (),
    "--chat-template": (CHATML,),
    "--max-tokens": (),
    "--temperature": (),
    "--top-k": (),
    "--top-p": (),
    "--min-p": (),
    "--repetition-penalty": (),
    "--seed": (),
    "--stop": (),
    "--limit": (),
    "--sort": SORTS,
    "--processes": (),
    "--rows": (),
    "--seconds": (),
    "--shard-tokens": (),
    "--vocab-size": (),
}
# Where a command takes fewer of them.
VALUES_OF_COMMANDS = {("convert", "--dtype"): ("float32", "float64")}
PATH_OPTIONS = ("--text", "--table", "--file", "--tokenizer", "--out")
TASKS_OPTION = "--tasks"
OPTIONS_WITH_EQUALS = {"--emit-jobs": ("slurm", "jobset"), "--only": ()}


def candidates(arguments: Sequence[str]) -> list[str]:
    """What the last of these arguments of `hybridnorm`, which is typed in part, may become.

    A candidate that ends in a space is a whole argument; the others, such as `train.steps=`, go on.
    """
    before, typed = arguments[:-1], arguments[-1]
    if not before:
        found = _whole([*COMMANDS, "--help", "--version"])
    else:
        actions = _actions(before[0])
        found = _whole(actions) if len(before) == 1 else []
        length = 2 if len(before) > 1 and before[1] in actions else 1
        found += _of_command(" ".join(before[:length]), before[length:], typed)
    return [candidate for candidate in dict.fromkeys(found) if candidate.startswith(typed)]


def _actions(command: str) -> list[str]:
    """What may follow a command that has several, such as `lab`."""
    return [name.removeprefix(f"{command} ") for name in SYNTAX if name.startswith(f"{command} ")]


def _of_command(command: str, given: Sequence[str], typed: str) -> list[str]:
    if command not in SYNTAX:
        return []
    option = given[-1] if given else ""
    if option in PATH_OPTIONS:
        return _files(typed)
    if option == TASKS_OPTION:
        begun = typed[: typed.rfind(",") + 1]
        return [
            f"{begun}{found}" for found in [*_whole([PAPER, *PAPER_TASKS]), *_files(typed[len(begun) :], (".yaml",))]
        ]
    if option in VALUES_OF_OPTIONS:
        return _whole(VALUES_OF_COMMANDS.get((command, option), VALUES_OF_OPTIONS[option]))
    if typed.startswith("-"):
        return _options(command)
    if command == "runs compare" or (command in ("eval", "generate", "export") and not given):
        return _run_directories(typed)
    goes_on = _values(command, typed) if "=" in typed else _keys(command, typed)
    return [*_positionals(command, given, typed), *goes_on]


def _options(command: str) -> list[str]:
    found = _whole(["--help"])
    for option in SYNTAX[command].options:
        if option in OPTIONS_WITH_EQUALS:
            found.append(f"{option}=")
            found += _whole(f"{option}={value}" for value in OPTIONS_WITH_EQUALS[option])
        else:
            found += _whole([option])
    return found


def _positionals(command: str, given: Sequence[str], typed: str) -> list[str]:
    if command in ("train", "plan", "lab signal", "lab widths", "lab compare", "data inspect"):
        return [*_whole(named_configurations.names()), *_files(typed, named_configurations.SUFFIXES)]
    if command in ("tokenize", "tokenizer train"):
        return _files(typed)
    if command in ("convert", "export"):
        return _directories(typed)
    if command == "schemes":
        return _whole(SCHEMES)
    if command == "lab claims":
        return _whole(read_claims())
    if command in ("lab report", "runs") and not given:
        return _directories(typed)
    return _whole(SHELLS) if command == "completion" and not given else []


def _keys(command: str, typed: str) -> list[str]:
    """Sections first, and the keys of a section when its dot is there: all of them would fill the screen."""
    found = [f"{name}=" for name in SYNTAX[command].keys]
    if not SYNTAX[command].takes_run_keys:
        return found
    if "." not in typed:
        return [*found, *(f"{section}." for section in SECTIONS), *(f"{path}=" for path in FIELDS if "." not in path)]
    for path, field in FIELDS.items():
        is_map = typing.get_origin(field.type) is dict
        found.append(f"{path}." if is_map else f"{path}=")
    return found


def _values(command: str, typed: str) -> list[str]:
    """`key=value` for what may follow `key=`."""
    name, _, value = typed.partition("=")
    syntax = SYNTAX[command]
    is_runs = name in FIELDS and syntax.takes_run_keys
    if name not in syntax.keys and not is_runs:
        return []
    if name in PATH_KEYS:
        return [f"{name}={path}" for path in _files(value)]
    begun = value[: max(value.rfind(","), value.rfind("["), value.rfind(" ")) + 1] or "["
    if name == PLUGINS:
        return [f"{name}={begun}{path.rstrip()}" for path in _files(value.removeprefix(begun), (".py",))]
    if name in CHOICES_OF_LISTS:
        return [f"{name}={begun}{choice}" for choice in CHOICES_OF_LISTS[name]]
    if name in CHOICES:
        return _whole(f"{name}={choice}" for choice in CHOICES[name])
    hint = read_hint(FIELDS[name].type) if is_runs else None
    if hint is None or hint.kind is not bool:
        return []
    booleans = ["true", "false", "null"] if hint.optional else ["true", "false"]
    return _whole(f"{name}={boolean}" for boolean in booleans)


def _whole(arguments: Iterable[str]) -> list[str]:
    return [f"{argument} " for argument in arguments]


def _files(typed: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Directories, and files that end in one of the suffixes."""
    found = _directories(typed)
    for path, entry in _entries(typed).items():
        if entry.is_file() and entry.name.endswith(suffixes):
            found.append(f"{path} ")
    return found


def _directories(typed: str) -> list[str]:
    return [f"{path}/" for path, entry in _entries(typed).items() if entry.is_dir()]


def _run_directories(typed: str) -> list[str]:
    """Directories, those of runs as whole arguments; and before a folder is named the runs of run.dir."""
    folders = [typed] if "/" in typed else [typed, f"{RunSection.dir}/"]
    found = []
    for folder in folders:
        for path, entry in _entries(folder).items():
            if entry.is_dir():
                is_run = Path(entry.path, "checkpoints").is_dir()
                found.append(f"{path} " if is_run else f"{path}/")
    return found


def _entries(typed: str) -> dict[str, os.DirEntry]:
    """What lies in the directory that `typed` names up to its last slash, by path as it would be typed."""
    folder, slash, start = typed.rpartition("/")
    try:
        with os.scandir(os.path.expanduser(folder + slash) or ".") as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return {}
    is_hidden_wanted = start.startswith(".")
    return {
        f"{folder}{slash}{entry.name}": entry for entry in listed if is_hidden_wanted or not entry.name.startswith(".")
    }
