"""What the arguments `[NAME or FILE.yaml or DATA_FILE ...] [key=value ...]` of every command mean."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridnorm_jax.config import named_configurations
from hybridnorm_jax.config.data_file_names import source_of
from hybridnorm_jax.config.key_lookup import FIELDS, entry_key
from hybridnorm_jax.config.mixture_section import SourceSection
from hybridnorm_jax.config.plugins import check_started_with_plugins, import_plugins
from hybridnorm_jax.config.resume_keys import MIXTURE, decides_trajectory
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import PLUGINS, build, gather, read_file
from hybridnorm_jax.config_fields import spelled
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
    An argument that is named as text or tokens, such as book.txt, is one of data.files; and data.source follows from
    the names in data.files where nobody sets it to anything but the default.
    Plugins (run.plugins) are imported, unless it is a run's own config.yaml that names them. run.name=auto becomes the
    name of all configurations, such as 151m+mine, followed by -key=value for each override. Only what decides the
    trajectory enters it (resume_keys.decides_trajectory), so that the same training is the same run wherever it runs.

    Raises:
      ConfigError: one line that names the file or the override and says what would be right.
    """
    files, overrides = sort(arguments)
    files = files or [named_configurations.find(default)]
    settings = read(files, overrides)
    _choose_source(settings, overrides)
    _choose_sources_of_mixture(settings)
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
    """Tell files and overrides apart; data files become an override.

    Raises:
      ConfigError: no such configuration; data files beside data.files=...
    """
    files, overrides, data_files = [], [], []
    for argument in arguments:
        if is_override(argument):
            overrides.append(argument)
        elif "=" not in argument and source_of(argument) is not None:
            data_files.append(argument)
        else:
            files.append(named_configurations.find(argument))
    if data_files:
        twice = next((override for override in overrides if override.startswith("data.files=")), None)
        if twice is not None:
            raise ConfigError(f"{data_files[0]}: a data file beside {twice}; name all of them in one place")
        overrides.append(f"data.files={json.dumps(data_files, ensure_ascii=False)}")
    return Arguments(files, overrides)


def is_override(argument: str) -> bool:
    """Whether an argument is key=value, and not a file: the path of a YAML file may hold `=`, since names of runs do.

    `init_from=runs/trunk/config.yaml` is an override: a key stands before its `=`.
    `runs/lab-steps=100/config.yaml` is a file: `runs/lab-steps` is no key.
    """
    if "=" not in argument:
        return False
    could_be_key = re.fullmatch(r"[\w.]+", argument.partition("=")[0]) is not None
    return could_be_key or not argument.endswith(named_configurations.SUFFIXES)


def _choose_source(settings: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set data.source to what the names in data.files say, where it would be stdlib, which reads no files."""
    names = settings.get("data.files", ())
    is_asked = any(override.startswith("data.source=") for override in overrides)
    if is_asked or not names or settings.get("data.source", "stdlib") != "stdlib":
        return
    sources = {name: source_of(name) for name in names}
    known = sorted({source for source in sources.values() if source is not None})
    if len(known) > 1:
        raise ConfigError(f"data.files={spelled(list(names))}: names of text and of token files; a run reads one kind")
    if known:
        settings["data.source"] = known[0]


def _choose_sources_of_mixture(settings: dict[str, Any]) -> None:
    """Write down what the files of each source are, as far as their names say so: a saved run is read elsewhere too."""
    entries = settings.get(MIXTURE, {})
    for name, entry in entries.items():
        kind = SourceSection(**entry).kind
        if kind is not None:
            settings[MIXTURE] = settings[MIXTURE] | {name: entry | {"source": kind}}


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
        name += f"-{_short(path, last_parts)}={text}"
    plain = re.sub(r"[^A-Za-z0-9._=+-]", "_", name)
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 11]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _short(path: str, last_parts: Sequence[str]) -> str:
    """A key without its section, as far as that gives no two runs one name.

    Args:
      last_parts: of all keys.
    """
    if (entry := entry_key(path)) is not None:
        return ".".join(part for part in (entry.entry, entry.name) if part)
    # Two keys may end alike, such as train.batch_size and eval.batch_size.
    return path if last_parts.count(_last_part(path)) > 1 else _last_part(path)


def _names_of(files: Sequence[Path]) -> list[str]:
    """The names of the configurations that decide the trajectory; of the last one where none does."""
    deciding = [file for file in files if any(map(decides_trajectory, read([file], [])))]
    return [file.stem for file in deciding or files[-1:]]


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]
