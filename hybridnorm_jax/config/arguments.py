"""What the arguments `[NAME or FILE.yaml or DATA_FILE ...] [key=value ...]` of every command mean."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.data_file_names import source_of
from hybridnorm_jax.config.key_lookup import FIELDS
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import build, gather, read_file
from hybridnorm_jax.errors import ConfigError

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
    An argument that is named as text or tokens, such as book.txt, is one of data.files; and data.source follows from
    the names in data.files where nobody sets it to anything but the default.
    Plugins (run.plugins) are imported. run.name=auto becomes the last file's stem followed by -key=value for each
    override outside run.* and distributed.*, so that the same arguments name the same run.

    Raises:
      ConfigError: one line that names the file or the override and says what would be right.
    """
    files, overrides = sort(arguments)
    files = files or [named_configurations.find(default)]
    settings = read(files, overrides)
    _choose_source(settings, overrides)
    if settings.get("run.name", "auto") == "auto":
        settings["run.name"] = _run_name(files[-1].stem, overrides)
    return build(settings)


def sort(arguments: Sequence[str]) -> Arguments:
    """Tell files and overrides apart; data files become an override.

    The name of a run holds `=`, and so may the path of its config.yaml.

    Raises:
      ConfigError: no such configuration; data files beside data.files=...
    """
    files, overrides, data_files = [], [], []
    for argument in arguments:
        is_yaml = argument.endswith(named_configurations.SUFFIXES) and not re.match(r"[\w.]+=", argument)
        if "=" not in argument and source_of(argument) is not None:
            data_files.append(argument)
        elif is_yaml or "=" not in argument:
            files.append(named_configurations.find(argument))
        else:
            overrides.append(argument)
    if data_files:
        twice = next((override for override in overrides if override.startswith("data.files=")), None)
        if twice is not None:
            raise ConfigError(f"{data_files[0]}: a data file beside {twice}; name all of them in one place")
        overrides.append(f"data.files={json.dumps(data_files, ensure_ascii=False)}")
    return Arguments(files, overrides)


def _choose_source(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set data.source to what the names in data.files say, where it would be stdlib, which reads no files."""
    names = settings.get("data.files", ())
    is_asked = any(override.startswith("data.source=") for override in overrides)
    if is_asked or not names or settings.get("data.source", "stdlib") != "stdlib":
        return
    sources = {name: source_of(name) for name in names}
    known = sorted({source for source in sources.values() if source is not None})
    if len(known) > 1:
        raise ConfigError(f"data.files={list(names)}: names of text and of token files; a run reads one kind")
    if known:
        settings["data.source"] = known[0]


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
