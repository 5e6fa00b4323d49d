"""A RunConfig from YAML and key=value overrides, and back.

OmegaConf reads the YAML and the overrides and writes the YAML. Types are checked in key_values.py, against the fields
of run_config.py: OmegaConf's structured configurations take neither mappings of tuples nor defaults that a dataclass
replaces when it is made, and their messages do not say what was written where.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridnorm_jax.config.key_lookup import FIELDS, SECTIONS, flatten, nearest_key
from hybridnorm_jax.config.key_values import show, typed
from hybridnorm_jax.config.plugins import check_started_with_plugins, import_plugins
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError, did_you_mean

PLUGINS = "run.plugins"


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; from_yaml(to_yaml(config)) == config, floats included."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


def from_yaml(text: str, overrides: Sequence[str] = (), *, origin: str = "saved configuration") -> RunConfig:
    """The configuration that to_yaml wrote, with `key=value` overrides.

    The plugins that the overrides name are imported; those that the text names never are.

    Args:
      origin: the file it came from, for errors.

    Raises:
      ConfigError: as `parse`; or the text names plugins, and this process was started without any.
    """
    asked = gather([], [override for override in overrides if override.startswith(PLUGINS)])
    import_plugins(asked.get(PLUGINS, ()))
    settings = gather([(origin, text)], overrides)
    if PLUGINS not in asked:
        check_started_with_plugins(settings.get(PLUGINS, ()), origin)
    return build(settings)


def read_file(path: str | Path) -> str:
    """The text of a YAML file; ConfigError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error


def gather(texts: Sequence[tuple[str, str]], overrides: Sequence[str]) -> dict[str, Any]:
    """Typed values by dotted key, of (file, its YAML) pairs and then of overrides; later ones win."""
    settings: dict[str, Any] = {}
    for file, text in texts:
        for path, value in flatten(_tree(file, OmegaConf.load, io.StringIO(text))):
            _put(settings, path, value, f"{file}: {path}={show(value)}")
    for override in overrides:
        key, _, text = override.partition("=")
        for path, value in flatten(_tree(override, OmegaConf.from_dotlist, [override])):
            _put(settings, path, value, override, written=text if path == key else None)
    return settings


def take(section: type, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Split off a command's own keys: (`section` made of the key=value that name its fields, all other arguments).

    Raises:
      ConfigError: a value has the wrong type, or a key without a dot is neither a field of `section` nor a run's.
    """
    fields = {field.name: field for field in dataclasses.fields(section)}
    values, others = {}, []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if equals and key in fields:
            value = _tree(argument, OmegaConf.from_dotlist, [argument])[key]
            values[key] = typed(value, fields[key].type, argument, written=text)
        elif equals and key.isidentifier() and key not in FIELDS and key not in SECTIONS:
            raise ConfigError(f"{argument}: no such key{did_you_mean(key, fields)}")
        else:
            others.append(argument)
    return section(**values), others


def build(settings: dict[str, Any]) -> RunConfig:
    """The checked dataclasses. Plugins, which may register what keys name, must have been imported."""
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    top: dict[str, Any] = {}
    for path, value in settings.items():
        section, _, name = path.rpartition(".")
        (values[section] if section else top)[name] = value
    return RunConfig(**{name: section(**values[name]) for name, section in SECTIONS.items()}, **top)


def _tree(origin: str, read: Callable, source: Any) -> dict:
    """`read(source)` as plain dicts, with OmegaConf's and YAML's errors as one line."""
    try:
        tree = read(source)
        # Unresolved: interpolations can read the environment, and a run is to follow from its file alone.
        plain = OmegaConf.to_container(tree, resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and read is OmegaConf.load else ""
        raise ConfigError(f"{origin}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{origin}: cannot be read: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: cannot be read: nested too deeply") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{origin}: must hold keys and values, such as `train: {{steps: 20}}`")
    return plain


def _put(settings: dict[str, Any], path: str, value: Any, where: str, written: str | None = None) -> None:
    """Set one key to a value of its type; the entries of a map are added to those already there."""
    if path in SECTIONS:
        raise ConfigError(f"{where}: {path} is a section, not a key; --help lists its keys")
    if path not in FIELDS:
        nearest = nearest_key(path)
        hint = f"did you mean {nearest!r}?" if nearest else "--help lists every key"
        raise ConfigError(f"{where}: no such key; {hint}")
    new = typed(value, FIELDS[path].type, where, written)
    settings[path] = settings.get(path, {}) | new if isinstance(new, dict) else new


def _plain(value: Any) -> Any:
    """Tuples as lists: OmegaConf's own tuples refuse the text `???`."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
