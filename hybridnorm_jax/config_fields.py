"""Fields of the configuration's dataclasses: each documents itself, and its value is checked when it is set."""

import dataclasses
import io
import json
import numbers
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml

from hybridnorm_jax.errors import ConfigError, did_you_mean, one_line

# Of one text, such as a path (Linux allows 4,096 bytes), and of one list, such as data.files.
LONGEST_TEXT = 4096
MOST_ITEMS = 100_000
# How YAML writes null.
NULLS = ("", "~", "null", "Null", "NULL")
# What it says of a text decides whether quotes are needed.
_YAML = yaml.emitter.Emitter(io.StringIO(), allow_unicode=True)

Value = TypeVar("Value")

if TYPE_CHECKING:
    Filled = Annotated[Value, "a file may say null; construction puts a value in its place"]
else:

    class Filled:
        """`Filled[int]`: a field that may be set to null, and whose readers always find an int.

        To what reads configuration files it is `int | None`, to type checkers `int`.
        """

        def __class_getitem__(cls, value_type):
            return value_type | None


def present(value: Value | None) -> Value:
    """The value of a field that may be null in general, but that construction has checked not to be null here."""
    if value is None:
        raise AssertionError("a field is null that the checks of its dataclass should have refused")
    return value


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a key may have; of a list, each of its numbers. None: no limit on that side."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the number is in the range; NaN is in none."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{words} {_number(limit)}" for words, limit in limits.items() if limit is not None)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def key(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field whose meaning and range `hybridnorm train --help` prints.

    Every key of numbers has a limit on both sides. The limits let everything pass that a run could mean, and stop what
    none could: infinity, a slip of the hand by thousands, a size for which no machine has room.
    """
    limits = Range(at_least=at_least, above=above, at_most=at_most, below=below)
    metadata = {"meaning": meaning, "range": limits if limits != Range() else None}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(prefix: str, config: Any) -> None:
    """Raise ConfigError for the first field of a dataclass whose value is not in its range, or a text too long to be.

    Args:
      prefix: of the fields' names, such as "train"; "" for none.
      config: an instance; its fields are made by `key`. Those that hold dataclasses check themselves.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        problem = fault(value, field) if "meaning" in field.metadata else None
        if problem is not None:
            name = f"{prefix}.{field.name}" if prefix else field.name
            raise ConfigError(f"{name}={shortened(spelled(value))}: {problem}")


def fault(value: Any, field: dataclasses.Field) -> str | None:
    """What would be right instead of a field's value, such as `must be at least 1`; None where it is right."""
    limits: Range | None = field.metadata["range"]
    if value is None or (limits is None and isinstance(value, (bool, int, float))):
        return None  # as of most keys, of which some pages check millions
    if isinstance(value, (tuple, list, dict)) and len(value) > MOST_ITEMS:
        return f"{len(value):,} items; must be at most {MOST_ITEMS:,}"
    texts = _names(value)
    for item in _items(value):
        if isinstance(item, str):
            if limits is not None:
                return "must be a number"
            texts.append(item)
        elif limits is not None and not (isinstance(item, numbers.Real) and not isinstance(item, bool)):
            return "must be a number"
        elif limits is not None and not limits.holds(item):
            return f"must be {limits}"
    return next((problem for problem in map(_fault_of_text, texts) if problem is not None), None)


def _names(value: Any) -> list[str]:
    """The names in a map; of anything else none."""
    return list(value) if isinstance(value, dict) else []


def _items(value: Any) -> Iterator[Any]:
    """The values in lists and maps, without the names of maps; of any other value itself; of None nothing."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _items(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _items(each)
    elif value is not None:
        yield value


def _fault_of_text(text: str) -> str | None:
    if len(text) > LONGEST_TEXT:
        return f"{len(text):,} characters; must be at most {LONGEST_TEXT:,}"
    # A separator or a prompt may hold an end of line or a tab.
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in text):
        return "must not hold control characters"
    return None


def spelled(value: Any) -> str:
    """A value as it may be written after `key=`, on a command line whose shell leaves it as it is, and in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_spelled_inside(name)}: {_spelled_inside(item)}' for name, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spelled_inside, value))}]"
    if isinstance(value, str):
        # A key that holds a text takes what is typed, but for spaces at its ends, quotes at its beginning and null.
        is_as_typed = value == value.strip() and value[:1] not in ("", "'", '"') and value.isprintable()
        return value if is_as_typed and value not in NULLS else _quoted(value)
    return _in_python(value)


def _in_python(value: Any) -> str:
    """A value as Python writes it; of more than 4,300 digits it writes none."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return f"{'-' if value < 0 else ''}a number of more than 100 digits"
    return str(value)


def _spelled_inside(value: Any) -> str:
    """A value in a list or a map, where YAML gives more characters a meaning."""
    if not isinstance(value, str):
        return spelled(value)
    is_plain = value.isprintable() and _YAML.analyze_scalar(value).allow_flow_plain and value not in NULLS
    return value if is_plain else _quoted(value)


def _quoted(text: str) -> str:
    """In quotes of YAML; what cannot be seen is written as JSON has it, which YAML reads."""
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    return json.dumps(text, ensure_ascii=False)


def shortened(value: Any) -> str:
    """A text, or an argument of a function, as an error shows it: on one line, and of a long one the beginning."""
    line = one_line(_in_python(value))
    return line if len(line) <= 200 else f"{line[:100]}... ({len(line):,} characters)"


def check(condition: bool, key_name: str, value: Any, right: str) -> None:
    """Raise ConfigError(`key_name=value: right`) unless the condition holds.

    Args:
      value: of the key, as the configuration has it; the error shows it as it would be typed.
    """
    if not condition:
        raise ConfigError(f"{key_name}={shortened(spelled(value))}: {right}")


def check_choice(key_name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ConfigError unless value is one of the known words."""
    if value not in known:
        raise ConfigError(f"{key_name}={shortened(spelled(value))}: not known{did_you_mean(value, known)}")
