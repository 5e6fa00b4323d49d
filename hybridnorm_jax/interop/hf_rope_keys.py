"""How a Hugging Face config.json states rotary position embeddings.

Every architecture has keys of its own at the top of the file. A newer file states the rotation in `rope_parameters`, an
older one may have `rope_scaling`, which newer versions of transformers read in its place. What these two hold is in
hf_rope_scaling.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.hf_config_keys import Json, Key, head_dim_of
from hybridnorm_jax.interop.hf_rope_scaling import (
    FRACTION,
    KEYS_OF_TYPE,
    LARGEST,
    LENGTH,
    THETA,
    Rotation,
    Statement,
    rotation,
    written,
)
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.config_attention import FIRST_ROTATION, SECOND_ROTATION

# In this order transformers looks for the mapping: the first that holds anything is the only one it reads.
PLACES = ("rope_scaling", "rope_parameters")
DEFAULT_THETA = 10000.0
POSITIONS = "max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Rope:
    """The keys by which an architecture states one rotation.

    Attributes:
      theta: of the base, at the top of config.json. It is the one that is written, because every version of
        transformers reads it.
      fraction: of the fraction that rotates; None: whole heads rotate.
      default_theta, default_fraction: where none is stated.
      restated: keys that the architecture's class wrote once and never reads -> the key whose value they repeat.
      most_positions: max_position_embeddings where it is absent.
      types: the rope_types that the architecture's class knows.
      renamed: old names of rope_types.
      default: rope_parameters where they are absent or null, and there is no rope_scaling.
      original: default of the key at the top of the file that states the length before a stretching; None: there is
        no such key.
    """

    theta: str = THETA
    fraction: str | None = None
    default_theta: float = DEFAULT_THETA
    default_fraction: float = 1.0
    restated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    most_positions: int = 2048
    types: tuple[str, ...] = tuple(KEYS_OF_TYPE)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    original: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that config.json may hold."""
        lengths = () if self.original is None else (LENGTH,)
        return (self.theta, self.fraction or FRACTION, *self.restated, *PLACES, *lengths)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ModelConfig that say how a head rotates.

        Raises:
          UserError: a value that is none, or a rotation that is not implemented.
        """
        self._check_restated(document, source)
        found = self._rotation(document, source)
        return found.fields | {"rotary_dim": _rotary_dim(found.fraction, head_dim_of(fields), source)}

    def _rotation(self, document: Json, source: str) -> Rotation:
        """The rotation of the mapping that transformers reads; the other, if it holds anything, must say the same."""
        stated = [Statement(place, _mapping(document, place, source), source) for place in PLACES]
        stated = [statement for statement in stated if statement.values]
        if not stated:  # to transformers a mapping without keys is a mapping, and no reason for the default
            values = self.default if document.get(PLACES[1]) is None else {}
            return self._rotation_of(Statement(PLACES[1], values, source), document)
        found = self._rotation_of(stated[0], document)
        if len(stated) > 1 and self._rotation_of(stated[1], document) != found:
            right = f"{PLACES[0]} is read in its place and says something else"
            raise UserError(f"{source}: {PLACES[1]}={stated[1].values!r:.80}, but {right}")
        return found

    def _rotation_of(self, statement: Statement, document: Json) -> Rotation:
        source = statement.source
        kind = statement.type(self.renamed)
        if kind not in self.types:
            known = ", ".join(self.types)
            raise UserError(f"{source}: {statement.place}.rope_type={kind!r} is not one of this architecture: {known}")
        theta = _stated(statement, document, THETA, self.theta)
        fraction = _stated(statement, document, FRACTION, self.fraction or FRACTION)
        if self.fraction is None and fraction not in (None, 1):
            raise UserError(f"{source}: {FRACTION}={fraction}: this architecture rotates whole heads")
        original = None
        if self.original is not None:
            original = Key(LENGTH, (), self.original, least=1).read(document, source)
        return rotation(
            statement,
            kind=kind,
            theta=self.default_theta if theta is None else theta,
            fraction=self.default_fraction if fraction is None else fraction,
            most_positions=Key(POSITIONS, (), self.most_positions, least=1).read(document, source),
            original=original,
        )

    def _check_restated(self, document: Json, source: str) -> None:
        for name, own in self.restated.items():
            if name in document and (own not in document or document[own] != document[name]):
                right = f"this architecture reads {own} instead, which does not say the same; remove one of them"
                raise UserError(f"{source}: {name}={document[name]!r:.80}: {right}")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model."""
        keys: dict[str, Any] = {self.theta: config.rope_theta}
        if self.fraction is not None:
            keys[self.fraction] = written_fraction(config.rotary_width, config.head_dim)
        mapping = written(_of_config(config))
        if self.original is not None and config.rope_original_length is not None:
            keys[LENGTH] = config.rope_original_length
        if self.default:
            return keys | {PLACES[1]: mapping | {THETA: config.rope_theta}}
        return keys | ({} if mapping == {"rope_type": "default"} else {PLACES[0]: mapping})


def _of_config(config: ModelConfig) -> Rotation:
    """A model's first rotation."""
    return Rotation(**{name: getattr(config, name) for name in Rotation(rope_theta=1.0).fields})


def _mapping(document: Json, place: str, source: str) -> Json:
    values = document.get(place)
    if values is not None and not isinstance(values, Mapping):
        raise UserError(f"{source}: {place}={values!r:.80} must be a mapping")
    return values or {}


def _stated(statement: Statement, document: Json, meaning: str, name: str) -> float | None:
    """What the file says of the base or the fraction, in the mapping or at its top; None: nothing.

    Raises:
      UserError: it is no number, or the two do not say the same.
    """
    found = []
    if meaning in statement.values:
        found.append((f"{statement.place}.{meaning}", statement.values[meaning]))
    # Where heads rotate as a whole transformers passes over a null.
    if name in document and not (document[name] is None and name == FRACTION):
        found.append((name, document[name]))
    for key, value in found:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{statement.source}: {key}={value!r:.80} must be a number")
        if not 0 < value <= LARGEST[meaning]:
            raise UserError(f"{statement.source}: {key}={value!r:.80} is out of range")
    for key, value in found[1:]:
        if value != found[0][1]:
            raise UserError(f"{statement.source}: {key}={value}, but elsewhere in the file it is {found[0][1]}")
    return float(found[0][1]) if found else None


def _rotary_dim(fraction: float, head_dim: int | None, source: str) -> int | None:
    """How many channels of a head rotate; None: all, or the file's sizes are wrong."""
    if fraction == 1 or head_dim is None:
        return None
    rotary_dim = int(head_dim * fraction)  # transformers truncates
    if rotary_dim < 2 or rotary_dim % 2:
        right = f"{rotary_dim} of {head_dim} channels would rotate, but it must be an even number of at least 2"
        raise UserError(f"{source}: {FRACTION}={fraction}: {right}")
    return rotary_dim


def written_fraction(rotary_dim: int, head_dim: int) -> float:
    """A fraction whose product with head_dim is rotary_dim, rounded down as well as to the nearest integer."""
    fraction = rotary_dim / head_dim
    return fraction if int(head_dim * fraction) == rotary_dim else math.nextafter(fraction, math.inf)


@dataclasses.dataclass(frozen=True)
class LayeredRope:
    """The keys of an architecture whose layers with a window have another rotation than those without.

    rope_parameters holds a mapping for each of the two. In an older file rope_scaling is that of the layers without a
    window, whose base the top of the file states.

    Attributes:
      thetas: default of the base of layers without and with a window.
      local: key at the top of the file of the base of layers with a window; None: there is none.
      most_positions: max_position_embeddings where it is absent.
    """

    thetas: tuple[float, float]
    local: str | None = None
    most_positions: int = 2048

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that config.json may hold."""
        return (THETA, FRACTION, *PLACES, *(() if self.local is None else (self.local,)))

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of ModelConfig that say how heads rotate in each layer."""
        stated, old = _mapping(document, PLACES[1], source), _mapping(document, PLACES[0], source)
        for name in stated:
            if name not in (FULL, SLIDING):
                right = f"this architecture reads {PLACES[1]}.{FULL} and {PLACES[1]}.{SLIDING} alone"
                raise UserError(f"{source}: {PLACES[1]}.{name}={stated[name]!r:.80}: {right}")
        if stated and old:
            raise UserError(f"{source}: {PLACES[0]}={dict(old)!r:.80}: only without {PLACES[1]}")
        windows = fields.get("windows") or (0,)
        layers = [windows[layer % len(windows)] > 0 for layer in range(fields["num_layers"])]
        if self.local is None and THETA in document and document[THETA] != self.thetas[1] and any(layers):
            right = f"say in {PLACES[1]}.{FULL} and {PLACES[1]}.{SLIDING} which layers it is of"
            raise UserError(f"{source}: {THETA}={document[THETA]!r:.80}: {right}")
        full = self._rotation(Statement(f"{PLACES[1]}.{FULL}", old or _inner(stated, FULL, source), source), document)
        local = Statement(f"{PLACES[1]}.{SLIDING}", _inner(stated, SLIDING, source), source)
        return _joined(full, self._rotation(local, document, is_local=True), layers, source)

    def _rotation(self, statement: Statement, document: Json, *, is_local: bool = False) -> Rotation:
        kind = statement.type({})
        top = self.local if is_local else THETA
        theta = _stated(statement, document if top is not None else {}, THETA, top or THETA)
        if _stated(statement, document, FRACTION, FRACTION) not in (None, 1):
            raise UserError(f"{statement.source}: {statement.place}.{FRACTION}: this architecture rotates whole heads")
        if statement.values.get("truncate") is False:
            raise UserError(f"{statement.source}: {statement.place}.truncate=False is not implemented by transformers")
        return rotation(
            statement,
            kind=kind,
            theta=self.thetas[is_local] if theta is None else theta,
            fraction=1.0,
            most_positions=Key(POSITIONS, (), self.most_positions, least=1).read(document, statement.source),
            original=None,
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model."""
        first = _of_config(config)
        second = first
        if config.second_rope_theta is not None:
            second = Rotation(rope_theta=config.second_rope_theta)
        local = {
            rotation
            for rotation, window in zip(config.layer_rotations, config.layer_windows, strict=True)
            if window > 0
        }
        full, sliding = (first, second) if SECOND_ROTATION in local or not local else (second, first)
        mappings = {FULL: full, SLIDING: sliding}
        return {PLACES[1]: {name: written(each) | {THETA: each.rope_theta} for name, each in mappings.items()}}


def _inner(stated: Json, name: str, source: str) -> Json:
    return _mapping(stated, name, f"{source}: {PLACES[1]}") if name in stated else {}


def _joined(full: Rotation, local: Rotation, layers: list[bool], source: str) -> dict[str, Any]:
    """The fields of a model with these rotations.

    Args:
      full, local: of layers without and with a window.
      layers: of each layer, whether it has a window.
    """
    if full == local or not any(layers):
        return full.fields
    if all(layers):
        return local.fields
    # A second rotation is a plain one.
    first, second, first_is_local = (full, local, False) if local.rope_scaling == "none" else (local, full, True)
    if second.rope_scaling != "none":
        raise UserError(f"{source}: {PLACES[1]}: {FULL} and {SLIDING} both have a rope_type, which is not implemented")
    numbers = [FIRST_ROTATION if layer == first_is_local else SECOND_ROTATION for layer in layers]
    return first.fields | {"rope_layers": tuple(numbers), "second_rope_theta": second.rope_theta}
