"""How a Hugging Face config.json states rotary position embeddings.

Every architecture has keys of its own at the top of the file. A newer file states the rotation in `rope_parameters`, an
older one may have `rope_scaling`, which newer versions of transformers read in its place. The keys within these are
the same for all architectures.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hybridnorm_jax.config_fields import present, shortened
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import ModelConfig

Json = Mapping[str, Any]

# In this order transformers looks for the mapping: the first that holds anything is the only one it reads.
PLACES = ("rope_scaling", "rope_parameters")
THETA, FRACTION = "rope_theta", "partial_rotary_factor"
DEFAULT_THETA = 10000.0


LARGEST = {THETA: 2.0**63, FRACTION: 1.0}


class _Statement(NamedTuple):
    """What the file says of the rotation.

    Attributes:
      name: the key.
      meaning: THETA or FRACTION.
      value: as the file has it.
      is_read: by transformers, which reads one of PLACES and passes over the other.
    """

    name: str
    meaning: str
    value: Any
    is_read: bool = True


@dataclasses.dataclass(frozen=True)
class Rope:
    """The keys by which an architecture states the rotation at the top of config.json.

    Attributes:
      theta: of the base. It is the one that is written, because every version of transformers reads it.
      fraction: of the fraction that rotates; None: whole heads rotate.
      default_fraction: where none is stated.
      restated: keys that the architecture's class wrote once and never reads -> the key whose value they repeat.
    """

    theta: str = THETA
    fraction: str | None = None
    default_fraction: float = 1.0
    restated: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that may stand at the top of config.json."""
        return (self.theta, self.fraction or FRACTION, *self.restated)

    def read(self, document: Json, source: str, *, head_dim: int | None) -> dict[str, Any]:
        """ModelConfig's rope_theta and rotary_dim.

        Args:
          document: what config.json holds.
          source: the file, for messages.
          head_dim: width of a head; None where the file's sizes are wrong.

        Raises:
          UserError: a value that is none, or anything but the plain rotation.
        """
        found: dict[str, float] = {}
        statements = list(self._statements(document, source))
        for statement in statements:
            self._check_number(statement, source)
            value = float(statement.value)
            if statement.is_read and found.setdefault(statement.meaning, value) != value:
                raise UserError(_contradiction(statement, found[statement.meaning], source))
        found = {THETA: DEFAULT_THETA, FRACTION: self.default_fraction} | found
        for statement in statements:
            if statement.value != found[statement.meaning]:
                raise UserError(_contradiction(statement, found[statement.meaning], source))
        fraction = found[FRACTION]
        whole = fraction == 1 or head_dim is None
        return {
            "rope_theta": found[THETA],
            "rotary_dim": None if whole else _even_width(fraction, present(head_dim), source),
        }

    def _check_number(self, statement: _Statement, source: str) -> None:
        name, value = statement.name, statement.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{source}: {name}={value!r:.80} must be a number")
        if not 0 < value <= LARGEST[statement.meaning]:
            raise UserError(f"{source}: {name}={value!r:.80} is out of range")
        if statement.meaning == FRACTION and self.fraction is None and value != 1:
            raise UserError(f"{source}: {name}={value}: this architecture rotates whole heads")

    def write(self, config: ModelConfig) -> dict[str, float]:
        """The keys of a model."""
        keys = {self.theta: config.rope_theta}
        if self.fraction is not None:
            keys[self.fraction] = written_fraction(config.rotary_width, config.head_dim)
        return keys

    def _statements(self, document: Json, source: str) -> Iterator[_Statement]:
        """What the file says of the base and the fraction; anything but the plain rotation is an error."""
        meanings = {self.theta: THETA, (self.fraction or FRACTION): FRACTION}
        for name, meaning in meanings.items():
            # Where heads rotate as a whole transformers passes over a null.
            is_unset = name not in document or (document[name] is None and name == FRACTION)
            if not is_unset:
                yield _Statement(name, meaning, document[name])
        for name, own in self.restated.items():
            if name in document and (own not in document or document[own] != document[name]):
                right = f"this architecture reads {own} instead, which does not say the same; remove one of them"
                raise UserError(f"{source}: {name}={document[name]!r:.80}: {right}")
        yield from _statements_in_place(document, source)


def _statements_in_place(document: Json, source: str) -> Iterator[_Statement]:
    """What rope_scaling and rope_parameters say."""
    is_read = True
    for place in PLACES:
        values = document.get(place)
        if values is not None and not isinstance(values, Mapping):
            raise UserError(f"{source}: {place}={values!r:.80} must be a mapping")
        for name, value in (values or {}).items():
            if name in (THETA, FRACTION):
                yield _Statement(name, name, value, is_read)
            elif name not in ("rope_type", "type") or value != "default":
                raise UserError(
                    f"{source}: {place}.{shortened(name)}={value!r:.80}: only the plain rotation is implemented"
                )
        is_read = is_read and not values


def _contradiction(statement: _Statement, found: float, source: str) -> str:
    instead = "elsewhere in the file it is" if statement.is_read else f"{PLACES[0]} is read in its place and means"
    return f"{source}: {statement.name}={statement.value}, but {instead} {found}"


def _even_width(fraction: float, head_dim: int, source: str) -> int:
    """How many channels of a head rotate."""
    rotary_dim = int(head_dim * fraction)  # transformers truncates
    if rotary_dim < 2 or rotary_dim % 2:
        right = f"{rotary_dim} of {head_dim} channels would rotate, but it must be an even number of at least 2"
        raise UserError(f"{source}: {FRACTION}={fraction}: {right}")
    return rotary_dim


def written_fraction(rotary_dim: int, head_dim: int) -> float:
    """A fraction whose product with head_dim is rotary_dim, rounded down as well as to the nearest integer."""
    fraction = rotary_dim / head_dim
    return fraction if int(head_dim * fraction) == rotary_dim else math.nextafter(fraction, math.inf)
