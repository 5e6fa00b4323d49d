"""Fields of the configuration's dataclasses: each documents itself, and its value is checked when it is set."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from hybridnorm_jax.errors import ConfigError, did_you_mean


def key(default: Any, meaning: str) -> Any:
    """A dataclass field whose meaning `hybridnorm train --help` prints."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"meaning": meaning})
    return dataclasses.field(default=default, metadata={"meaning": meaning})


Value = TypeVar("Value")


def filled(value: Value | None) -> Value:
    """A field's value that null may stand for in a file, but that its dataclass has replaced on construction."""
    if value is None:
        raise AssertionError("the dataclass has left null where it should have put the value that null stands for")
    return value


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
