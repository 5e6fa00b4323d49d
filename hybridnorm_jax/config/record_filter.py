"""data.filter: which records are read, as conditions on their fields. A small language of its own: nothing is run.

FIELD OPERATOR VALUE        language == en        meta.score >= 0.5        source in [wiki, books]
"""

import dataclasses
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.errors import ConfigError, DataError

_EQUALS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda found, asked: found == asked,
    "!=": lambda found, asked: found != asked,
    "in": lambda found, asked: found in asked,
    "not in": lambda found, asked: found not in asked,
}
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
OPERATORS = (*_EQUALS, *_ORDERS)
_CONDITION = re.compile(r"\s*(?P<field>\S+?)\s*(?P<operator>==|!=|<=|>=|<|>|\s(?:not\s+)?in\s)\s*(?P<value>.*\S)\s*")


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition that a record must meet.

    Attributes:
      text: as the user wrote it.
      field: the name of a field; with dots, of a field of an object in a field, unless a field has the whole name.
      operator: one of OPERATORS.
      value: a string, a number, a truth value or None (null); a tuple of these for `in` and `not in`.
    """

    text: str
    field: str
    operator: str
    value: Any

    def holds(self, record: Mapping[str, Any], place: str) -> bool:
        """Whether the record meets the condition. A field that a record does not have is null.

        Null is neither smaller nor larger than anything.

        Raises:
          DataError: a number is to be compared with a string, or the field holds a list or an object.
        """
        found = field_value(record, self.field)
        if found is not None and not isinstance(found, str | int | float):
            wrong = "the field holds no string, number, true, false or null"
            raise DataError(f"{place}: data.filter={spelled([self.text])}: {wrong}")
        if self.operator in _EQUALS:
            asked = tuple(map(_comparable, self.value)) if isinstance(self.value, tuple) else _comparable(self.value)
            return _EQUALS[self.operator](_comparable(found), asked)
        if found is None:
            return False
        if isinstance(found, str) != isinstance(self.value, str):
            wrong = "compares a string with a number" if isinstance(found, str) else "compares a number with a string"
            raise DataError(f"{place}: data.filter={spelled([self.text])}: {wrong}, {str(found)[:50]!r}")
        return _ORDERS[self.operator](found, self.value)


def _comparable(value: object) -> object:
    """A value that equals what JSON calls equal: in Python, true is 1."""
    return (isinstance(value, bool), value)


def parse_conditions(texts: tuple[str, ...]) -> tuple[Condition, ...]:
    """The conditions of data.filter, all of which must hold.

    Raises:
      ConfigError: something else than a condition.
    """
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        right = f"a condition is FIELD OPERATOR VALUE with one of {', '.join(OPERATORS)}, such as 'language == en'"
        raise ConfigError(f"data.filter={spelled([text])}: {right}")
    name = " ".join(match["operator"].split())
    try:
        value = _value(match["value"])
    except ValueError as error:
        right = "put a string into double quotes, or leave it as it is: 'language == en'"
        raise ConfigError(f"data.filter={spelled([text])}: {match['value']!r} is no value; {right}") from error
    several = isinstance(value, list)
    if several != (name in ("in", "not in")):
        right = "`in` and `not in` need a list, such as 'language in [en, de]', and others none"
        raise ConfigError(f"data.filter={spelled([text])}: {right}")
    for one in value if several else (value,):
        if one is not None and not isinstance(one, str | int | float):
            raise ConfigError(f"data.filter={spelled([text])}: a value is a string, a number, true, false or null")
        if name in _ORDERS and (one is None or isinstance(one, bool)):
            raise ConfigError(f"data.filter={spelled([text])}: {name} needs a number or a string")
    return Condition(text, match["field"], name, tuple(value) if several else value)


def _value(text: str) -> Any:
    """A value as JSON writes it, or else a string as it stands there; a list may hold both."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        pass
    if text.startswith("[") and text.endswith("]"):
        return [_value(one.strip()) for one in text[1:-1].split(",")]
    if not text or text[0] in "\"'[{":
        raise ValueError("neither JSON nor a plain string")
    return text


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def field_value(record: Mapping[str, Any], field: str) -> Any:
    """A field of a record; `meta.language` is the field `language` of the object `meta`. None where there is none."""
    if field in record:
        return record[field]
    found: Any = record
    for part in field.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found
