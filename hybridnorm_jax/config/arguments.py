"""What the arguments `[NAME or FILE.yaml ...] [key=value ...]` of every command mean."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.key_lookup import FIELDS
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import build, gather, read_file

LONGEST_NAME = 120
# Keys whose values do not enter the name of a run.
NAMELESS_SECTIONS = ("run", "distributed")


class Arguments(NamedTuple):
    """The arguments of a command, sorted: the files of configurations, and the key=value overrides."""

    files: list[Path]
    overrides: list[str]


def parse(arguments: Sequence[str], default: str = named_configurations.DEFAULT) -> RunConfig:
    """The configuration that `[NAME or FILE.yaml ...] [key=value ...]` asks for.

    Files are merged first, then overrides; later ones win. Without a file the configuration named `default` is read.
    Plugins (run.plugins) are imported. run.name=auto becomes the last file's stem followed by -key=value for each
    override outside run.* and distributed.*, so that the same arguments name the same run.

    Raises:
      ConfigError: one line that names the file or the override and says what would be right.
    """
    files, overrides = sort(arguments)
    files = files or [named_configurations.find(default)]
    settings = read(files, overrides)
    if settings.get("run.name", "auto") == "auto":
        settings["run.name"] = _run_name(files[-1].stem, overrides)
    return build(settings)


def sort(arguments: Sequence[str]) -> Arguments:
    """Tell files and overrides apart. The name of a run holds `=`, and so may the path of its config.yaml."""
    files, overrides = [], []
    for argument in arguments:
        is_yaml = argument.endswith(named_configurations.SUFFIXES) and not re.match(r"[\w.]+=", argument)
        if is_yaml or "=" not in argument:
            files.append(named_configurations.find(argument))
        else:
            overrides.append(argument)
    return Arguments(files, overrides)


def read(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Typed values by dotted key, of YAML files and then of overrides; later ones win.

    Raises:
      ConfigError: a file or an override cannot be read, sets an unknown key or has a wrong type.
    """
    return gather([(str(file), read_file(file)) for file in files], overrides)


def _run_name(stem: str, overrides: Sequence[str]) -> str:
    chosen = {path: text for path, _, text in (override.partition("=") for override in overrides)}
    last_parts = [_last_part(path) for path in FIELDS]
    name = stem
    for path, text in sorted(chosen.items()):
        if path.partition(".")[0] in NAMELESS_SECTIONS:
            continue
        # checkpoint.every and eval.every would give one name to two runs.
        is_shared = last_parts.count(_last_part(path)) > 1
        name += f"-{path if is_shared else _last_part(path)}={text}"
    plain = re.sub(r"[^A-Za-z0-9._=+-]", "_", name)
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 11]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]
