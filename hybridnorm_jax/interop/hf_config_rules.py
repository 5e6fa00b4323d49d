"""Keys of a Hugging Face config.json that together decide fields of a ModelConfig, or fields that no key states."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from hybridnorm_jax.interop.hf_config_keys import Json, Key
from hybridnorm_jax.model.config import ModelConfig


class Rule(Protocol):
    """Keys of config.json that together decide fields of ModelConfig."""

    @property
    def names(self) -> Collection[str]:
        """Every key that a config.json may hold for it."""

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the keys decide.

        Args:
          document: what config.json holds.
          source: the file, for messages.
          fields: those that are decided already.

        Raises:
          UserError: a value that is none, or means what no model here computes.
        """

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; values that are read back as another model where none means this one."""


@dataclasses.dataclass(frozen=True)
class RootOfWidth:
    """The embedding is multiplied by the root of its width: always, or where a key says so.

    Attributes:
      key: the key, true by default.
    """

    key: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return () if self.key is None else (self.key,)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.embedding_scale."""
        if self.key is not None and not Key(self.key, (), True).read(document, source):
            return {}
        return {"embedding_scale": float(fields["d_model"]) ** 0.5}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The key."""
        return {} if self.key is None else {self.key: config.embedding_scale == float(config.d_model) ** 0.5}


@dataclasses.dataclass(frozen=True)
class TimesTheWidth:
    """Feed-forward layers are so many times as wide as the stream; no key says so."""

    factor: int

    @property
    def names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.mlp_dim."""
        return {"mlp_dim": self.factor * fields["d_model"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclasses.dataclass(frozen=True)
class Choice:
    """True and false of several keys together choose fields, the scheme among them.

    Attributes:
      defaults: the keys, and what they mean where they are absent.
      fields: the keys' values, in this order -> the fields.
    """

    defaults: Mapping[str, bool]
    fields: Mapping[tuple[bool, ...], Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return tuple(self.defaults)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes among which they choose."""
        return tuple(dict.fromkeys(fields["scheme"] for fields in self.fields.values()))

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields."""
        values = tuple(Key(name, (), default).read(document, source) for name, default in self.defaults.items())
        return dict(self.fields[values])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; the defaults where they do not mean its scheme."""
        for values, fields in self.fields.items():
            if fields["scheme"] == config.scheme:
                return dict(zip(self.defaults, values, strict=True))
        return dict(self.defaults)
