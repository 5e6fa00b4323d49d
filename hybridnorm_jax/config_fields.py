"""Fields of the configuration's dataclasses: each documents itself, and its value is checked when it is set."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from hybridnorm_jax.errors import ConfigError, did_you_mean

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


def key(default: Any, meaning: str) -> Any:
    """A dataclass field whose meaning `hybridnorm train --help` prints."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"meaning": meaning})
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def check(condition: bool, key_name: str, value: Any, right: str) -> None:
    """Raise ConfigError(`key_name=value: right`) unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key_name}={value}: {right}")


def check_choice(key_name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ConfigError unless value is one of the known words."""
    if value not in known:
        raise ConfigError(f"{key_name}={value}: not known{did_you_mean(value, known)}")


def check_positive(prefix: str, config: Any, names: Iterable[str]) -> None:
    """Raise ConfigError for the first of these attributes that is set and below 1."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= 1, f"{prefix}.{name}", value, "must be at least 1")
