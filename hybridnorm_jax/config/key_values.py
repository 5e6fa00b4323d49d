"""Values of keys: from what YAML or the command line gives to the type of the field. The way back is `spelled`.

The type of a key decides how its text is read. There is one spelling of each value:

    text     as it is written: `no`, 007 and 2024-01-01 are texts like any other
    bool     true or false; yes, no, on and off are refused
    integer  decimal digits, such as 20 or 1_000_000; 010, 0x10, 1:30 and 1e3 are refused
    number   an integer, or 0.1, .1, 1., 1e-3, 1.5e+3; infinity and NaN are read, and are in no key's range
    null     null or ~, where the key may be null
"""

import dataclasses
import re
import types
import typing
from decimal import Decimal
from typing import Any, NamedTuple

from hybridnorm_jax.config.yaml_nodes import Node, Scalar
from hybridnorm_jax.config_fields import fault, shortened
from hybridnorm_jax.errors import ConfigError, did_you_mean

DIGITS = r"(?:0|[1-9]\d{0,2}(?:_\d{3})+|[1-9]\d*)"
INTEGER = re.compile(rf"[-+]?{DIGITS}", re.ASCII)
NUMBER = re.compile(rf"[-+]?(?:{DIGITS}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
# YAML's spellings, Python's, and those of JSON's writers.
NOT_FINITE = re.compile(r"[-+]?\.?(?:inf|infinity)|\.?nan", re.ASCII | re.IGNORECASE)
BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


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
    dict[str, float]: TypeWords("map", "a map of numbers, such as {name: 0.5}"),
}


def type_words(kind: Any) -> TypeWords:
    """How a type is called. The values of a list or a map may be maps with keys of their own, which a dataclass has."""
    if kind in TYPE_WORDS:
        return TYPE_WORDS[kind]
    if dataclasses.is_dataclass(kind):
        return TypeWords("map", f"a map with the keys {_names(kind)}")
    if typing.get_origin(kind) is dict:
        return TypeWords("map", f"a map, such as {{name: {{...}}}} with the keys {_names(typing.get_args(kind)[1])}")
    return TypeWords("list", f"a list, such as [{{...}}] with the keys {_names(typing.get_args(kind)[0])}")


def _names(record: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(record))


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
    return type_words(hint.kind).name + ("|null" if hint.optional else "")


def typed(node: Node, field: dataclasses.Field, where: str) -> Any:
    """The value of a key's node, as the field says.

    Args:
      node: from YAML.
      field: made by config_fields.key.
      where: names the key, its value and where it is set, for errors.

    Raises:
      ConfigError: the value has another type, is not in the key's range, or holds an interpolation.
    """
    kind, optional = read_hint(field.type)
    if optional and isinstance(node, Scalar) and node.is_null:
        return None
    try:
        value = _read(node, kind, where)
    except _WrongTypeError:
        right = f"expected {type_words(kind).phrase}{' or null' if optional else ''}"
        raise ConfigError(f"{where}: {right}{_hint(node, kind)}") from None
    except _InterpolationError:
        raise ConfigError(f"{where}: interpolation (${{...}}) is not supported") from None
    problem = fault(value, field)
    if problem is not None:
        raise ConfigError(f"{where}: {problem}")
    return value


class _WrongTypeError(Exception):
    """A node of another type than asked."""


class _InterpolationError(Exception):
    """`${`, with which other programs read the environment; a run is to follow from its configuration alone."""


def _read(node: Node, kind: Any, where: str) -> Any:
    """The node as a value of this type, without None; a map with keys of its own as a dict of those that are there."""
    if dataclasses.is_dataclass(kind) and isinstance(node, dict):
        return _record(node, kind, where)
    if typing.get_origin(kind) is tuple and isinstance(node, list):
        inner = typing.get_args(kind)[0]
        return tuple(_read(item, inner, f"{where}: item {number}") for number, item in enumerate(node, start=1))
    if typing.get_origin(kind) is dict and isinstance(node, dict):
        inner = typing.get_args(kind)[1]
        return {name: _read(item, inner, f"{where}: {shortened(name)}") for name, item in node.items()}
    if not isinstance(node, Scalar):
        raise _WrongTypeError
    if kind is str and not node.is_null:
        if "${" in node.text:
            raise _InterpolationError
        return node.text
    readers = {bool: _read_bool, int: _read_int, float: _read_float}
    if not node.plain or kind not in readers:
        raise _WrongTypeError
    return readers[kind](node.text)


def _record(node: dict[str, Node], kind: Any, where: str) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in node:
        if name not in fields:
            raise ConfigError(f"{where}: {shortened(name)}: no such key{did_you_mean(name, fields)}")
    return {name: typed(item, fields[name], f"{where}: {name}") for name, item in node.items()}


def made(value: Any, annotation: Any) -> Any:
    """A value that `typed` has read, with dataclasses in the place of maps that have keys of their own."""
    kind = read_hint(annotation).kind
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return kind(**{field.name: value[field.name] for field in dataclasses.fields(kind) if field.name in value})
    if value is None:
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(made(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) is dict:
        return {name: made(item, typing.get_args(kind)[1]) for name, item in value.items()}
    return value


def _read_bool(text: str) -> bool:
    if text not in BOOLS:
        raise _WrongTypeError
    return BOOLS[text]


def _read_int(text: str) -> int:
    if NOT_FINITE.fullmatch(text):
        return typing.cast(int, _read_float(text))  # no key's range holds it, and to say so is more to the point
    if not INTEGER.fullmatch(text):
        raise _WrongTypeError
    # int() refuses more than 4,300 digits.
    return int(Decimal(text.replace("_", "")))


def _read_float(text: str) -> float:
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if not NUMBER.fullmatch(text):
        raise _WrongTypeError
    return float(text.replace("_", ""))


def _hint(node: Node, kind: Any) -> str:
    """What is probably wrong with the spelling of a number or bool."""
    if not isinstance(node, Scalar) or kind not in (bool, int, float):
        return ""
    if not node.plain:
        return ", without quotes"
    if kind is int and NUMBER.fullmatch(node.text) and float(node.text.replace("_", "")).is_integer():
        return ", written in digits"
    is_octal_or_hex = re.fullmatch(r"[-+]?0[0-9_xob][0-9a-fA-F_]*", node.text)
    return ", in decimal without leading zeros" if is_octal_or_hex and kind is not bool else ""
