"""JSON that is nested too deeply for Python's parser: the strings of an object are found without recursion.

What is nested deeply need not be in the field that is read.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}:,]|[^\s\[\]{}:,"]+|"', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Python's parser reads the last three, which are no JSON.
_NAMES = {"null": None, "true": True, "false": False, "NaN": 0.0, "Infinity": 0.0, "-Infinity": 0.0}
_CLOSES = {"[": "]", "{": "}"}
# What may stand at a place, in words.
VALUE, VALUE_OR_END, KEY, KEY_OR_END, COLON = "a value", "a value or ']'", "a name", "a name or '}'", "':'"


class Unread(NamedTuple):
    """A value that is not read: `kind`, as kind_of says it."""

    kind: str


def kind_of(value: object) -> str:
    """What a JSON value is, in the words of JSON."""
    match value:
        case Unread(kind=kind):
            return kind
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return "a string"
        case dict():
            return "an object"
        case list():
            return "a list"
    return "a number"


def read_strings(content: str) -> object:
    """What a JSON text holds: an object with its strings; every value that is no string stands as Unread.

    Raises:
      ValueError: it is not JSON; the message says what is wrong at which column.
    """
    reader = _Reader()
    for token, column in _tokens(content):
        reader.take(token, column)
    if reader.expected:
        raise ValueError("it ends inside a value")
    return reader.result


def _tokens(content: str) -> Iterator[tuple[str, int]]:
    """(token, its column counted from 1) of a JSON text."""
    position = _SPACE.match(content).end()
    while position < len(content):
        match = _TOKEN.match(content, position)
        if match is None:  # a space that is none of JSON's
            raise ValueError(f"{content[position]!r} at column {position + 1}")
        yield match.group(), position + 1
        position = _SPACE.match(content, match.end()).end()


class _Reader:
    """Goes through tokens; `expected` is what may stand next, in words, and empty after the end."""

    def __init__(self):
        self.expected = VALUE
        self.result: object = None
        self._open: list[str] = []
        self._name = ""

    def take(self, token: str, column: int) -> None:
        """The next token."""
        expected = self.expected
        if token == '"':
            raise ValueError(f"a string without end at column {column}")
        if expected in (VALUE, VALUE_OR_END) and token not in ("]", "}", ":", ","):
            self._value(token, column)
        elif expected in (KEY, KEY_OR_END) and token[0] == '"':
            name = _string(token, column)
            self._name = name if len(self._open) == 1 else self._name
            self.expected = COLON
        elif expected == COLON and token == ":":
            self.expected = VALUE
        elif self._open and token == _CLOSES[self._open[-1]] and expected not in (VALUE, KEY, COLON):
            self._open.pop()
            self._after_value()
        elif token == "," and self._open and expected == self._comma_or_end():
            self.expected = KEY if self._open[-1] == "{" else VALUE
        else:
            raise ValueError(f"{expected or 'nothing'} must stand at column {column}, not {token[:20]!r}")

    def _value(self, token: str, column: int) -> None:
        opens = {"[": Unread("a list"), "{": Unread("an object")}
        value = opens[token] if token in opens else _scalar(token, column)
        if not self._open:
            self.result = {} if token == "{" else value
        elif len(self._open) == 1 and isinstance(self.result, dict):
            self.result[self._name] = value
        if token in opens:
            self._open.append(token)
            self.expected = KEY_OR_END if token == "{" else VALUE_OR_END
        else:
            self._after_value()

    def _after_value(self) -> None:
        self.expected = self._comma_or_end() if self._open else ""

    def _comma_or_end(self) -> str:
        return f"',' or '{_CLOSES[self._open[-1]]}'"


def _scalar(token: str, column: int) -> object:
    if token[0] == '"':
        return _string(token, column)
    if token in _NAMES:
        return Unread(kind_of(_NAMES[token]))
    if not _NUMBER.fullmatch(token):
        raise ValueError(f"a value must stand at column {column}, not {token[:20]!r}")
    return Unread("a number")


def _string(token: str, column: int) -> str:
    try:
        return json.loads(token)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {column + error.pos}") from error
