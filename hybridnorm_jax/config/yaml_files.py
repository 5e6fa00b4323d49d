"""A RunConfig from YAML and key=value overrides, and back.

OmegaConf reads the YAML and the overrides and writes the YAML. Types are checked here, against the fields of
run_config.py: OmegaConf's structured configurations take neither mappings of tuples nor defaults that a dataclass
replaces when it is made, and their messages do not say what was written where.
"""

import dataclasses
import difflib
import io
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridnorm_jax.config.plugins import import_plugin
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError, did_you_mean

# The name in --help and the phrase in an error, by annotation.
TYPE_WORDS = {
    bool: ("bool", "true or false"),
    int: ("integer", "an integer"),
    float: ("number", "a number"),
    str: ("text", "text"),
    tuple[str, ...]: ("list", "a list, such as [a, b]"),
    tuple[int, ...]: ("list", "a list of integers, such as [1, 2]"),
    tuple[float, ...]: ("list", "a list of numbers, such as [1.0e-3, 3.0e-3]"),
    dict[str, tuple[str, ...]]: ("map", "a map of lists, such as {name: [a, b]}"),
}


def _known_fields() -> dict[str, dataclasses.Field]:
    known = {}
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            known |= {f"{field.name}.{inner.name}": inner for inner in dataclasses.fields(field.type)}
        else:
            known[field.name] = field
    return known


SECTIONS = {field.name: field.type for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)}
FIELDS = _known_fields()


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; from_yaml(to_yaml(config)) == config, floats included."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


def from_yaml(text: str, overrides: Sequence[str] = (), *, origin: str = "saved configuration") -> RunConfig:
    """The configuration that to_yaml wrote, with `key=value` overrides; its plugins are imported.

    Args:
      origin: the file it came from, for errors.

    Raises:
      ConfigError: as `parse`.
    """
    return build(gather([(origin, text)], overrides))


def read_file(path: str) -> str:
    """The text of a YAML file; ConfigError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error


def gather(texts: Sequence[tuple[str, str]], overrides: Sequence[str]) -> dict[str, Any]:
    """Typed values by dotted key, of (file, its YAML) pairs and then of overrides."""
    settings: dict[str, Any] = {}
    for file, text in texts:
        for path, value in flatten(_tree(file, OmegaConf.load, io.StringIO(text))):
            _put(settings, path, value, f"{file}: {path}={show(value)}")
    for override in overrides:
        key, _, text = override.partition("=")
        for path, value in flatten(_tree(override, OmegaConf.from_dotlist, [override])):
            _put(settings, path, value, override, written=text if path == key else None)
    return settings


def take(section: type, words: Sequence[str]) -> tuple[Any, list[str]]:
    """(an instance of a dataclass of keys, from the `key=value` words that name its fields; the other words).

    Raises:
      ConfigError: a value has the wrong type, or a word's key, which has no dot, is neither here nor in RunConfig.
    """
    fields = {field.name: field for field in dataclasses.fields(section)}
    values, others = {}, []
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in fields:
            value = _tree(word, OmegaConf.from_dotlist, [word])[key]
            values[key] = _typed(value, fields[key].type, word, written=text)
        elif equals and key.isidentifier() and key not in {*FIELDS, *SECTIONS}:
            raise ConfigError(f"{word}: no such key{did_you_mean(key, fields)}")
        else:
            others.append(word)
    return section(**values), others


def build(settings: dict[str, Any]) -> RunConfig:
    """Import the plugins, which may register what other keys name, then make the checked dataclasses."""
    for plugin in settings.get("run.plugins", ()):
        import_plugin(plugin)
    parts: dict[str, dict[str, Any]] = {section: {} for section in (*SECTIONS, "")}
    for path, value in settings.items():
        section, _, name = path.rpartition(".")
        parts[section][name] = value
    return RunConfig(**{name: section(**parts[name]) for name, section in SECTIONS.items()}, **parts[""])


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
    if not isinstance(plain, dict):
        raise ConfigError(f"{origin}: must hold keys and values, such as `train: {{steps: 20}}`")
    return plain


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs; an empty section has none."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if path in SECTIONS and value is None:
            continue
        if isinstance(value, dict) and value and path not in FIELDS:
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def _plain(value: Any) -> Any:
    """Tuples as lists: OmegaConf's own tuples refuse the word `???`."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _put(settings: dict[str, Any], path: str, value: Any, where: str, written: str | None = None) -> None:
    """Set one key to a value of its type; the entries of a map are added to those already there."""
    if path in SECTIONS:
        raise ConfigError(f"{where}: {path} is a section, not a key; --help lists its keys")
    if path not in FIELDS:
        raise ConfigError(f"{where}: no such key{_nearest(path)}")
    typed = _typed(value, FIELDS[path].type, where, written)
    settings[path] = {**settings.get(path, {}), **typed} if isinstance(typed, dict) else typed


def _nearest(path: str) -> str:
    """`; did you mean ...?`: a key is near when its last word is, whichever section it stands in."""

    def alike(known: str) -> tuple[float, float]:
        ends = known.rpartition(".")[2], path.rpartition(".")[2]
        return (difflib.SequenceMatcher(None, *ends).ratio(), difflib.SequenceMatcher(None, known, path).ratio())

    nearest = max(FIELDS, key=alike)
    return f"; did you mean {nearest!r}?" if alike(nearest)[0] > 0.6 else "; --help lists every key"


def _typed(value: Any, hint: Any, where: str, written: str | None = None) -> Any:
    """`value` as the annotation says. `written` is the text on the command line, for a key that holds text."""
    kind, optional = without_none(hint)
    if value is None and optional:
        return None
    if kind is str and written is not None and (written == "" or isinstance(value, (bool, int, float))):
        value = written
    if kind is str and isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}: interpolation (${{...}}) is not supported")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(item, typing.get_args(kind)[0], where) for item in value)
    if kind == dict[str, tuple[str, ...]] and isinstance(value, dict):
        return {str(name): _typed(item, tuple[str, ...], where) for name, item in value.items()}
    raise ConfigError(f"{where}: expected {TYPE_WORDS[kind][1]}{' or null' if optional else ''}")


def without_none(hint: Any) -> tuple[Any, bool]:
    """(annotation without None, whether None is allowed)."""
    if isinstance(hint, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None)), True
    return hint, False


def default(field: dataclasses.Field) -> Any:
    """The value of a key that nobody sets."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def show(value: Any) -> str:
    """A value as it may be written after `key=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {show(item)}' for name, item in value.items())}}}"
    return "''" if value == "" else str(value)
