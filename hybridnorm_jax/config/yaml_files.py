"""A RunConfig from YAML and key=value overrides, and back.

yaml_nodes.py reads the YAML, and key_values.py the values, each as the type of its key in run_config.py says.
"""

import copy
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybridnorm_jax.config.key_lookup import (
    ENCODER_FIELDS,
    FIELDS,
    RECORDS,
    SECTIONS,
    EntryKey,
    entry_key,
    nearest_key,
)
from hybridnorm_jax.config.key_values import BOOLS, INTEGER, NUMBER, made, read_hint, typed
from hybridnorm_jax.config.old_keys import IN_OLD_RUNS, LOGGERS_KEY, RENAMED, SWITCH, WANDB_SWITCH, switched
from hybridnorm_jax.config.plugins import KEY as PLUGINS
from hybridnorm_jax.config.plugins import check_started_with_plugins, import_plugins
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_nodes import MOST_CHARACTERS, Node, Scalar, read_yaml
from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import ConfigError, did_you_mean
from hybridnorm_jax.file_formats import pointer_of_git_lfs
from hybridnorm_jax.model.encoder_config import EncoderConfig


class _Writer(yaml.SafeDumper):
    """Writes YAML in which a text is quoted wherever it might be read as something else, here or elsewhere."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never: two equal lists are written twice."""
        return True


def _write_text(writer: _Writer, text: str) -> yaml.Node:
    means_more = text in BOOLS or INTEGER.fullmatch(text) or NUMBER.fullmatch(text)
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style="'" if means_more else None)


_Writer.add_representer(str, _write_text)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; from_yaml(to_yaml(config)) == config, floats included."""
    return yaml.dump(_plain(dataclasses.asdict(config)), Dumper=_Writer, sort_keys=False, allow_unicode=True)


def from_yaml(text: str, overrides: Sequence[str] = (), *, origin: str = "saved configuration") -> RunConfig:
    """The configuration that to_yaml wrote, in this version or in an earlier one, with `key=value` overrides.

    The plugins that the overrides name are imported; those that the text names never are.

    Args:
      origin: the file it came from, for errors.

    Raises:
      ConfigError: as `parse`; or the text names plugins, and this process was started without any.
    """
    import_plugins(named_plugins(overrides))
    settings = IN_OLD_RUNS | gather([(origin, text)], overrides, known=FIELDS | ENCODER_FIELDS)
    if not any(override.startswith(f"{PLUGINS}=") for override in overrides):
        check_started_with_plugins(settings.get(PLUGINS, ()), origin)
    return build(settings)


def named_plugins(overrides: Sequence[str]) -> tuple[str, ...]:
    """The plugins that `key=value` overrides name."""
    asked = gather([], [override for override in overrides if override.startswith(f"{PLUGINS}=")])
    return asked.get(PLUGINS, ())


def read_file(path: str | Path) -> str:
    """The text of a YAML file.

    Raises:
      ConfigError: there is none, it is no file, too large, not UTF-8 or a pointer of git-lfs.
    """
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            # A pipe may never end, and a device may have no end.
            raise ConfigError(f"{path}: cannot be read: {'a directory' if file.is_dir() else 'not a plain file'}")
        with file.open("rb") as stream:
            content = stream.read(MOST_CHARACTERS + 1)
        if len(content) > MOST_CHARACTERS:
            raise ConfigError(f"{path}: too large for a configuration, which has at most {MOST_CHARACTERS:,} bytes")
        if pointer := pointer_of_git_lfs(path, content):
            raise ConfigError(f"{path}: {pointer}")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read: {error}") from error  # NUL in a path


def gather(
    texts: Sequence[tuple[str, str]], overrides: Sequence[str], *, known: Mapping[str, dataclasses.Field] = FIELDS
) -> dict[str, Any]:
    """Typed values by dotted key, of (file, its YAML) pairs and then of overrides; later ones win.

    Args:
      known: the keys that the files may hold.
    """
    settings: dict[str, Any] = {}
    for file, text in texts:
        tree = read_yaml(text, file)
        if isinstance(tree, Scalar) and tree.is_null:
            continue
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: must hold keys and values, such as `train: {{steps: 20}}`")
        for path, node in _leaves(tree):
            _put(settings, path, node, f"{file}: {shortened(path)}{_shown(node)}", known)
    for override in overrides:
        path, _, text = override.partition("=")
        entry = entry_key(path)
        node = _argument(override, text, FIELDS.get(RENAMED.get(path, path)) if entry is None else entry.field)
        pairs = _leaves({path: node}) if entry is not None or path in RECORDS else [(path, node)]
        for inner, value in pairs:
            _put(settings, inner, value, shortened(override), FIELDS)
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
            values[key] = typed(_argument(argument, text, fields[key]), fields[key], shortened(argument))
        elif equals and key.isidentifier() and key not in FIELDS and key not in SECTIONS:
            raise ConfigError(f"{shortened(argument)}: no such key{did_you_mean(key, fields)}")
        else:
            others.append(argument)
    return section(**values), others


def _argument(argument: str, text: str, field: dataclasses.Field | None) -> Node:
    """The value in key=value. A text is taken as it is typed, unless it is in quotes, as in YAML."""
    hint = None if field is None else read_hint(field.type)
    if hint is not None and hint.kind is str and not text.lstrip().startswith(("'", '"')):
        # Nothing is the empty text, where the key cannot be null.
        return Scalar(text.strip(), plain=bool(text.strip()) or hint.optional)
    return read_yaml(text, shortened(argument), lines=False)


def _leaves(tree: dict[str, Node], prefix: str = "") -> Iterator[tuple[str, Node]]:
    """(dotted key, value) pairs of nested maps; an empty section has none."""
    for name, node in tree.items():
        path = f"{prefix}{name}"
        if path in SECTIONS and (node == {} or (isinstance(node, Scalar) and node.is_null)):
            continue
        if isinstance(node, dict) and node and not _is_value(path):
            yield from _leaves(node, f"{path}.")
        else:
            yield path, node


def _is_value(path: str) -> bool:
    """Whether a map is the value of this key, not a section or an entry of RECORDS with keys of its own."""
    entry = entry_key(path)
    return path in FIELDS and path not in RECORDS if entry is None else bool(entry.name)


def _shown(node: Node) -> str:
    """`=value` for errors; nothing of lists and maps, which may be long."""
    return f"={shortened(node.text)}" if isinstance(node, Scalar) else ""


def build(settings: dict[str, Any]) -> RunConfig:
    """The checked dataclasses. Plugins, which may register what keys name, must have been imported."""
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    top: dict[str, Any] = {}
    for path, value in settings.items():
        section, _, name = path.rpartition(".")
        (values[section] if section else top)[name] = made(value, (FIELDS | ENCODER_FIELDS)[path].type)
    sections = SECTIONS | ({"model": EncoderConfig} if ENCODER_FIELDS.keys() & settings.keys() else {})
    return RunConfig(**{name: section(**values[name]) for name, section in sections.items()}, **top)


def _put(settings: dict[str, Any], path: str, node: Node, where: str, known: Mapping[str, dataclasses.Field]) -> None:
    """Set one key to a value of its type; the entries of a map are added to those already there."""
    path = RENAMED.get(path, path)
    if path == WANDB_SWITCH:
        settings[LOGGERS_KEY] = switched(settings.get(LOGGERS_KEY), has_wandb=typed(node, SWITCH, where))
        return
    if path in SECTIONS:
        raise ConfigError(f"{where}: {path} is a section, not a key; --help lists its keys")
    key = path if path in known else next((key for key in known if path.startswith(f"{key}.")), None)
    if (entry := entry_key(path)) is not None:
        _put_in_entry(settings, entry, node, where)
        return
    if key is None:
        nearest = nearest_key(path)
        hint = f"did you mean {nearest!r}?" if nearest else "--help lists every key"
        raise ConfigError(f"{where}: no such key; {hint}")
    field, hint = known[key], read_hint(known[key].type)
    if key != path and typing.get_origin(hint.kind) is dict:
        # One entry of a map, such as data.validation.NAME=[FILE].
        field = copy.copy(field)
        field.type = typing.get_args(hint.kind)[1]
        new = {path.removeprefix(f"{key}."): typed(node, field, where)}
    else:
        new = typed({path: node} if key != path else node, field, where)
    settings[key] = settings.get(key, {}) | new if isinstance(new, dict) else new


def _put_in_entry(settings: dict[str, Any], path: EntryKey, node: Node, where: str) -> None:
    """Set one key of an entry of RECORDS, such as data.mixture.web.weight; the entry's other keys stay as they are."""
    keys = RECORDS[path.map]
    entries = settings.get(path.map, {})
    entry = entries.get(path.entry, {})
    if path.field is not None:
        entry = entry | {path.name: typed(node, path.field, where)}
    elif path.name:
        raise ConfigError(f"{where}: no such key{did_you_mean(path.name, keys)}; an entry has {', '.join(keys)}")
    elif node != {}:
        raise ConfigError(f"{where}: expected a map with the keys {', '.join(keys)}")
    settings[path.map] = entries | {path.entry: entry}


def _plain(value: Any) -> Any:
    """Tuples as lists, for which YAML has no type of its own."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
