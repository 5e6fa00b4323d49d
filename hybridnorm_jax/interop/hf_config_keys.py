"""How one key of a Hugging Face config.json is read into fields of a ModelConfig, and written from them.

What several keys decide together is in hf_config_rules.py, all keys of an architecture are in hf_architecture.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import ModelConfig

Json = Mapping[str, Any]
# Far beyond every published model, and few enough to be listed.
MOST_LAYERS = 10_000
# With two further rows still an int32, which positions are.
MOST_POSITIONS = 2**30


def names(text: str) -> frozenset[str]:
    """The keys that a text lists, with spaces between them."""
    return frozenset(text.split())


def none(document: Json) -> None:
    """Null means null, from which ModelConfig may derive a value."""


def four_times(*stated: str, default: int) -> Callable[[Json], int]:
    """Null means four times the width, which has been checked by then.

    Args:
      stated: names by which the document may state the width.
      default: the width where it states none.
    """
    return lambda document: 4 * next((int(document[name]) for name in stated if name in document), default)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that is one ModelConfig field, or several of one value.

    Attributes:
      name: the key.
      fields: of ModelConfig.
      default: where the key is absent.
      null: where it is null, a function of the document; without one null is an error.
      words: their value -> ours where these differ. Of several that mean one of ours the default is written, or the
        first.
      least: their smallest number. Without one ModelConfig decides.
      most: their largest number. A few bytes of config.json must not make anybody build a list of so many layers.
      alias: another name that the architecture's class reads as this one; it is never written.
      kind: type of the value where the default is null.
      written: attribute of ModelConfig that is written; by default the first of the fields.
    """

    name: str
    fields: tuple[str, ...]
    default: Any
    null: Callable[[Json], Any] | None = None
    words: Mapping[Any, Any] | None = None
    least: int | None = None
    most: int = 2**31 - 1
    alias: str | None = None
    kind: type = int
    written: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those by which a config.json may state it."""
        return (self.name,) if self.alias is None else (self.name, self.alias)

    def read(self, document: Json, source: str) -> Any:
        """Our value."""
        name = self._stated_name(document, source)
        value = document.get(name, self.default)
        if value is None:
            if self.null is None:
                raise UserError(f"{source}: {name}=null, but a value is needed")
            return self.null(document)
        if self.words is not None:
            if not isinstance(value, (str, bool)) or value not in self.words:
                known = ", ".join(map(str, self.words))
                raise UserError(f"{source}: {name}={value!r:.80} is not implemented; implemented: {known}")
            return self.words[value]
        return self._checked_number(name, value, source)

    def _stated_name(self, document: Json, source: str) -> str:
        """The name by which the document states the key; the first one where it does not."""
        if self.alias is None or self.alias not in document:
            return self.name
        if self.name not in document:
            return self.alias
        value, other = document[self.name], document[self.alias]
        if other != value:
            right = f"but {self.alias}, another name of it, is {other!r:.80}"
            raise UserError(f"{source}: {self.name}={value!r:.80}, {right}")
        return self.name

    def _checked_number(self, name: str, value: Any, source: str) -> Any:
        """A value of the default's type, or of `kind` where the default is null; a truth value is one of these, too."""
        kind = type(self.default) if self.default is not None else self.kind
        fitting = (int, float) if kind is float else kind
        # For Python True is an int.
        is_truth, wants_truth = isinstance(value, bool), kind is bool
        if is_truth != wants_truth or not isinstance(value, fitting):
            raise UserError(f"{source}: {name}={value!r:.80} must be of type {kind.__name__}")
        if kind in (int, float) and not -(2**31) < value <= self.most:  # NaN and Infinity, too
            raise UserError(f"{source}: {name}={value!r:.80} is out of range")
        if self.least is not None and value < self.least:
            raise UserError(f"{source}: {name}={value}: must be at least {self.least}")
        return kind(value)

    def write(self, config: ModelConfig) -> Any:
        """Their value; some value of theirs where none means ours, which config_to_json then finds by comparing."""
        value = getattr(config, self.written or self.fields[0])
        if value is None and self.null is not None:
            return None
        if self.words is not None:
            theirs = [word for word, meaning in self.words.items() if meaning == value]
            if self.default in theirs:
                return self.default
            return theirs[0] if theirs else next(iter(self.words))
        if self.least is not None:
            return self.default if value < self.least else value
        return self.default if value is None else value


@dataclasses.dataclass(frozen=True)
class Multiplier(Key):
    """A key whose value is a factor, which is null with us where it is 1."""

    def read(self, document: Json, source: str) -> Any:
        """Our value."""
        value = super().read(document, source)
        return None if value == 1 else value

    def write(self, config: ModelConfig) -> Any:
        """Their value."""
        value = super().write(config) if getattr(config, self.fields[0]) is not None else None
        return 1.0 if value is None else value


@dataclasses.dataclass(frozen=True)
class Inverse(Key):
    """A key whose value is one over ours."""

    power = -1.0

    def read(self, document: Json, source: str) -> Any:
        """Our value; null where it is 1."""
        value = super().read(document, source)
        if value <= 0:
            raise UserError(f"{source}: {self.name}={value} must be above 0")
        return None if self.written is None and value == 1 else value**self.power

    def write(self, config: ModelConfig) -> Any:
        """Their value: the one that is read as ours, where there is one."""
        value = getattr(config, self.written or self.fields[0])
        if value is None:
            return 1.0
        near = value ** (1 / self.power)
        if isinstance(self.default, int):
            return round(near)
        candidates = (float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
        return next((each for each in candidates if each > 0 and each**self.power == value), near)


@dataclasses.dataclass(frozen=True)
class InverseRoot(Inverse):
    """A key whose value is one over the square of ours."""

    power = -0.5


def head_dim_of(fields: Mapping[str, Any]) -> int | None:
    """The width of a head; None where ModelConfig will refuse the sizes."""
    if fields.get("head_dim") is not None:
        return int(fields["head_dim"])
    width, heads = fields["d_model"], fields["num_heads"]
    return width // heads if heads > 0 and width % heads == 0 else None
