"""Values of keys: from what YAML or the command line gives to the type of the field, and back to text."""

import types
import typing
from typing import Any, NamedTuple

from hybridnorm_jax.errors import ConfigError


class TypeWords(NamedTuple):
    """How a type is called: its name in --help, and the phrase that an error asks for."""

    name: str
    phrase: str


TYPE_WORDS = {
    bool: TypeWords("bool", "true or false"),
    int: TypeWords("integer", "an integer"),
    float: TypeWords("number", "a number"),
    str: TypeWords("text", "text"),
    tuple[str, ...]: TypeWords("list", "a list, such as [a, b]"),
    tuple[int, ...]: TypeWords("list", "a list of integers, such as [1, 2]"),
    tuple[float, ...]: TypeWords("list", "a list of numbers, such as [1.0e-3, 3.0e-3]"),
    dict[str, tuple[str, ...]]: TypeWords("map", "a map of lists, such as {name: [a, b]}"),
}


class Hint(NamedTuple):
    """An annotation: the type without None, and whether None is allowed."""

    kind: Any
    optional: bool


def read_hint(annotation: Any) -> Hint:
    """`int | None` as Hint(int, True), `int` as Hint(int, False)."""
    if isinstance(annotation, types.UnionType):
        kind = next(option for option in typing.get_args(annotation) if option is not type(None))
        return Hint(kind, optional=True)
    return Hint(annotation, optional=False)


def type_name(annotation: Any) -> str:
    """The type in a word, for --help: `integer`, or `integer|null`."""
    hint = read_hint(annotation)
    return TYPE_WORDS[hint.kind].name + ("|null" if hint.optional else "")


def typed(value: Any, annotation: Any, where: str, written: str | None = None) -> Any:
    """`value` as the annotation says.

    Args:
      value: what OmegaConf made of the YAML.
      where: names the key and where it is set, for errors.
      written: the text after `key=` on the command line, for a key that holds text: 007 stays 007.

    Raises:
      ConfigError: the value has another type, or holds an interpolation.
    """
    kind, optional = read_hint(annotation)
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
        return tuple(typed(item, typing.get_args(kind)[0], where) for item in value)
    if kind == dict[str, tuple[str, ...]] and isinstance(value, dict):
        return {str(name): typed(item, tuple[str, ...], where) for name, item in value.items()}
    raise ConfigError(f"{where}: expected {TYPE_WORDS[kind].phrase}{' or null' if optional else ''}")


def show(value: Any) -> str:
    """A value as it may be written after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {show(item)}' for name, item in value.items())}}}"
    return "''" if value == "" else str(value)
