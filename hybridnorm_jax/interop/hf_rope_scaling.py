"""What the mapping `rope_parameters`, or `rope_scaling`, of a config.json says of one rotation.

Its keys are the same for all architectures and depend on its rope_type. A key that its type does not have is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import UserError

Json = Mapping[str, Any]

THETA, FRACTION, LENGTH = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"
LARGEST = {THETA: 2.0**63, FRACTION: 1.0}
LARGEST_NUMBER = 1e6
_YARN = ("factor", LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# The keys of each rope_type, besides the type, the base and the fraction that rotates. "dynamic" is missing: its
# wavelengths follow the length of the text, so that what a token gives would change with the tokens after it.
KEYS_OF_TYPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": _YARN,
    "longrope": ("factor", LENGTH, "attention_factor", "short_factor", "long_factor"),
}
_NAMES = {"default": "none"}


@dataclasses.dataclass(frozen=True)
class Rotation:
    """One rotation of a model; the fields are those of ModelConfig, but for the fraction of a head that rotates."""

    rope_theta: float
    fraction: float = 1.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_length: int | None = None
    rope_bounds: tuple[float, ...] = ()
    rope_attention_factor: float | None = None
    rope_truncate: bool = True
    rope_short_factors: tuple[float, ...] = ()
    rope_long_factors: tuple[float, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of ModelConfig."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if name != "fraction"}


@dataclasses.dataclass(frozen=True)
class Statement:
    """A mapping of a config.json that states a rotation.

    Attributes:
      place: the key of the file that holds it, or keys with a dot between them.
      values: what it holds.
      source: the file, for messages.
    """

    place: str
    values: Json
    source: str

    def number(self, name: str, *, most: float = LARGEST_NUMBER) -> float:
        """The number that a key has."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{self.source}: {self.place}.{name}={value!r:.80} must be a number")
        if not 0 < value <= most:
            raise UserError(f"{self.source}: {self.place}.{name}={value!r:.80} is out of range")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """The number that a key has; None where it is absent or null."""
        return None if self.values.get(name) is None else self.number(name)

    def numbers(self, name: str) -> tuple[float, ...]:
        """The numbers of a list."""
        value = self.values.get(name)
        if not isinstance(value, list):
            raise UserError(f"{self.source}: {self.place}.{name}={value!r:.80} must be a list of numbers")
        named = dataclasses.replace(self, values={f"{name}[{index}]": each for index, each in enumerate(value)})
        return tuple(named.number(key) for key in named.values)

    def type(self, renamed: Mapping[str, str]) -> str:
        """The rope_type, which older files call type.

        Args:
          renamed: old names of types -> those of KEYS_OF_TYPE.
        """
        old = self.values.get("type", "default")
        found = self.values.get("rope_type", old)
        if "type" in self.values and old != found:
            raise UserError(f"{self.source}: {self.place}.rope_type={found!r:.80}, but type={old!r:.80}")
        kind = renamed.get(found, found) if isinstance(found, str) else found
        if kind not in KEYS_OF_TYPE:
            known = ", ".join(KEYS_OF_TYPE)
            raise UserError(
                f"{self.source}: {self.place}.rope_type={found!r:.80} is not implemented; implemented: {known}"
            )
        return str(kind)

    def check_keys(self, kind: str) -> None:
        """Raise UserError for a key that a rotation of this type does not have."""
        known = ("rope_type", "type", THETA, FRACTION, *KEYS_OF_TYPE[kind])
        for name, value in self.values.items():
            if name not in known:
                wrong = f"{self.place}.{shortened(name)}={value!r:.80}"
                raise UserError(f"{self.source}: {wrong}: rope_type={kind} has no such key; it has {', '.join(known)}")


def rotation(
    statement: Statement, *, kind: str, theta: float, fraction: float, most_positions: int, original: int | None
) -> Rotation:
    """The rotation that a mapping states.

    Args:
      statement: the mapping.
      kind: its rope_type.
      theta, fraction: the base and the fraction that rotates.
      most_positions: max_position_embeddings.
      original: length before the stretching where the file states it elsewhere; None: the mapping does.
    """
    statement.check_keys(kind)
    found = Rotation(rope_theta=theta, fraction=fraction, rope_scaling=_NAMES.get(kind, kind))
    if LENGTH in KEYS_OF_TYPE[kind]:
        found = dataclasses.replace(found, rope_original_length=_original(statement, original, most_positions))
    return _READERS[kind](found, statement, most_positions)


def _original(statement: Statement, original: int | None, most_positions: int) -> int:
    stated = most_positions if original is None else original
    value = statement.values.get(LENGTH, stated)
    if type(value) is not int or not 0 < value < 2**31:
        raise UserError(f"{statement.source}: {statement.place}.{LENGTH}={value!r:.80} must be a number of positions")
    if original is not None and value != original:
        right = f"the file's own {LENGTH}={original} is read instead"
        raise UserError(f"{statement.source}: {statement.place}.{LENGTH}={value}: {right}; remove one of them")
    return value


def _default(found: Rotation, statement: Statement, most_positions: int) -> Rotation:
    return found


def _linear(found: Rotation, statement: Statement, most_positions: int) -> Rotation:
    return dataclasses.replace(found, rope_factor=statement.number("factor"))


def _llama3(found: Rotation, statement: Statement, most_positions: int) -> Rotation:
    bounds = (statement.number("low_freq_factor"), statement.number("high_freq_factor"))
    return dataclasses.replace(found, rope_factor=statement.number("factor"), rope_bounds=bounds)


def _yarn(found: Rotation, statement: Statement, most_positions: int) -> Rotation:
    factor = statement.number("factor")
    attention_factor = statement.number_or_none("attention_factor")
    scales = [statement.values.get(name) or None for name in ("mscale", "mscale_all_dim")]
    if attention_factor is None and None not in scales:
        ours, all_channels = (statement.number(name) for name in ("mscale", "mscale_all_dim"))
        attention_factor = _magnitude(factor, ours) / _magnitude(factor, all_channels)
    truncate = statement.values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"{statement.source}: {statement.place}.truncate={truncate!r:.80} must be true or false")
    return dataclasses.replace(
        found,
        rope_factor=factor,
        rope_bounds=(statement.number_or_none("beta_slow") or 1.0, statement.number_or_none("beta_fast") or 32.0),
        rope_attention_factor=attention_factor,
        rope_truncate=truncate,
    )


def _magnitude(factor: float, scale: float) -> float:
    """YaRN's factor of cos and sin (2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _longrope(found: Rotation, statement: Statement, most_positions: int) -> Rotation:
    factor = statement.number_or_none("factor")
    if factor is None:
        factor = most_positions / (found.rope_original_length or most_positions)
    return dataclasses.replace(
        found,
        # A factor below 1 means 1: it decides the factor of cos and sin alone.
        rope_factor=max(factor, 1.0),
        rope_attention_factor=statement.number_or_none("attention_factor"),
        rope_short_factors=statement.numbers("short_factor"),
        rope_long_factors=statement.numbers("long_factor"),
    )


_READERS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def written(found: Rotation) -> dict[str, Any]:
    """The mapping of a rotation, without its base and its fraction."""
    kind = found.rope_scaling.replace("none", "default")
    values: dict[str, Any] = {"rope_type": kind}
    if kind == "default":
        return values
    values["factor"] = found.rope_factor
    if found.rope_original_length is not None:
        values[LENGTH] = found.rope_original_length
    if found.rope_attention_factor is not None:
        values["attention_factor"] = found.rope_attention_factor
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}.get(kind, ())
    values |= dict(zip(names, found.rope_bounds, strict=False))
    if kind == "yarn":
        values["truncate"] = found.rope_truncate
    if kind == "longrope":
        values |= {"short_factor": list(found.rope_short_factors), "long_factor": list(found.rope_long_factors)}
    return values
