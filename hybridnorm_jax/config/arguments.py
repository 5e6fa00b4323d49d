"""What the arguments `[NAME or FILE.yaml ...] [key=value ...]` of every command mean."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.data_file_names import source_of
from hybridnorm_jax.config.key_lookup import FIELDS
from hybridnorm_jax.config.plugins import check_started_with_plugins, import_plugins
from hybridnorm_jax.config.resume_keys import decides_trajectory
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import PLUGINS, build, gather, read_file
from hybridnorm_jax.errors import ConfigError

LONGEST_NAME = 120
# What a run writes; whoever has a run may have it from somebody else.
RUN_FILES = ("config.yaml", "checkpoints")


class Arguments(NamedTuple):
    """The arguments of a command, sorted: the files of configurations, and the key=value overrides."""

    files: list[Path]
    overrides: list[str]


def parse(arguments: Sequence[str], default: str = named_configurations.DEFAULT) -> RunConfig:
    """The configuration that `[NAME or FILE.yaml ...] [key=value ...]` asks for.

    Files are merged first, then overrides; later ones win. Without a file the configuration named `default` is read.
    Plugins (run.plugins) are imported, unless it is a run's own config.yaml that names them. run.name=auto becomes the
    name of all configurations, such as 151m+mine, followed by -key=value for each override. Only what decides the
    trajectory enters it (resume_keys.decides_trajectory), so that the same training is the same run wherever it runs.

    Raises:
      ConfigError: one line that names the file or the override and says what would be right.
    """
    files, overrides = sort(arguments)
    files = files or [named_configurations.find(default)]
    settings = read(files, overrides)
    if settings.get("run.name", "auto") == "auto":
        settings["run.name"] = _run_name(files, overrides)
    _import_plugins(files, overrides, settings.get(PLUGINS, ()))
    return build(settings)


def _import_plugins(files: Sequence[Path], overrides: Sequence[str], plugins: Sequence[str]) -> None:
    """Import the plugins, where an override or a configuration of the user's own has named them."""
    origin = None if PLUGINS in read([], overrides) else _origin_of_plugins(files)
    if origin is not None and is_of_a_run(origin):
        check_started_with_plugins(plugins, str(origin))
    else:
        import_plugins(plugins)


def _origin_of_plugins(files: Sequence[Path]) -> Path | None:
    """The last file that names plugins."""
    return next((file for file in reversed(files) if PLUGINS in read([file], [])), None)


def is_of_a_run(file: Path) -> bool:
    """Whether a YAML file is one that a run wrote, or lies in a run's directory: then it may be somebody else's."""
    real = file.resolve()
    is_in_a_run = all((real.parent / name).exists() for name in RUN_FILES)
    return is_in_a_run or RUN_FILES[0] in (file.name, real.name)


def sort(arguments: Sequence[str]) -> Arguments:
    """Tell files and overrides apart. The name of a run holds `=`, and so may the path of its config.yaml.

    A file of text or tokens, such as book.txt, stands for the overrides data.source and data.files.
    """
    files, overrides, data = [], [], []
    for argument in arguments:
        is_yaml = argument.endswith(named_configurations.SUFFIXES) and not re.match(r"[\w.]+=", argument)
        if is_yaml or "=" not in argument:
            if not is_yaml and source_of(argument) is not None:
                data.append(argument)
            else:
                files.append(named_configurations.find(argument))
        else:
            overrides.append(argument)
    return Arguments(files, [*_data_overrides(data), *overrides])


def _data_overrides(names: Sequence[str]) -> list[str]:
    """What sets data.source and data.files to these files."""
    if not names:
        return []
    sources = {source_of(name): name for name in names}
    if len(sources) > 1:
        text, tokens = sources["text"], sources["tokens"]
        raise ConfigError(f"{text} {tokens}: one holds text and the other tokens; name files of one kind")
    (source,) = sources
    return [f"data.source={source}", f"data.files={json.dumps(list(names), ensure_ascii=False)}"]


def read(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Typed values by dotted key, of YAML files and then of overrides; later ones win.

    Raises:
      ConfigError: a file or an override cannot be read, sets an unknown key or has a wrong type.
    """
    return gather([(str(file), read_file(file)) for file in files], overrides)


def _run_name(files: Sequence[Path], overrides: Sequence[str]) -> str:
    chosen = {path: text for path, _, text in (override.partition("=") for override in overrides)}
    last_parts = [_last_part(path) for path in FIELDS]
    name = "+".join(_names_of(files))
    for path, text in sorted(chosen.items()):
        if not decides_trajectory(path):
            continue
        # Two keys that end alike, such as train.batch_size and eval.batch_size, could give one name to two runs.
        is_shared = last_parts.count(_last_part(path)) > 1
        name += f"-{path if is_shared else _last_part(path)}={text}"
    plain = re.sub(r"[^A-Za-z0-9._=+-]", "_", name)
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 11]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _names_of(files: Sequence[Path]) -> list[str]:
    """The names of the configurations that decide the trajectory; of the last one where none does."""
    deciding = [file for file in files if any(map(decides_trajectory, read([file], [])))]
    return [file.stem for file in deciding or files[-1:]]


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]
