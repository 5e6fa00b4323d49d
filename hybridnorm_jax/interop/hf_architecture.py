"""Architecture: how one architecture of transformers states a model, as a config.json and as tensors.

The architectures themselves stand in architectures/.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.interop.hf_common_keys import COMMON_FIXED, COMMON_HARMLESS
from hybridnorm_jax.interop.hf_config_keys import Json, Key
from hybridnorm_jax.interop.hf_config_rules import Rule
from hybridnorm_jax.interop.tensor_places import TensorTable
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.schemes import SCHEMES


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How an architecture states a model.

    Attributes:
      name: its model_type.
      class_name: of its language model in transformers.
      constants: ModelConfig fields that are the same in all its models.
      keys: what config.json decides, key by key.
      tensors: where its tensors hold our leaves.
      rules: what several keys decide together.
      fixed: key -> the one value that is implemented, or a function (value, document) -> whether it is.
      harmless: keys of this architecture alone that do not touch the computation.
      summary: what is particular about it, for the table of the documentation.
      config_class: ModelConfig, or EncoderConfig for an encoder.
      classes: further classes whose checkpoints are read, where these are not the model without its head.
      family: another name by which it may be asked for, that of several architectures.
      code_files: of our PyTorch code, which stand beside the weights; none where transformers has the class.
    """

    name: str
    class_name: str
    constants: Mapping[str, Any]
    keys: tuple[Key, ...]
    tensors: TensorTable
    rules: tuple[Rule, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: Collection[str] = ()
    summary: str = ""
    config_class: type[ModelConfig] = ModelConfig
    classes: tuple[str, ...] = ()
    family: str = ""
    code_files: tuple[str, ...] = ()

    def read(self, document: Json, source: str) -> ModelConfig:
        """The ModelConfig of a config.json, in float32."""
        self._check(document, source)
        fields = dict(self.constants)
        for key in self.keys:
            fields |= dict.fromkeys(key.fields, key.read(document, source))
        for rule in self.rules:
            fields |= rule.read(document, source, fields)
        try:
            return self.config_class(**fields)
        except ConfigError as error:
            raise UserError(f"{source}: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of a model: its meaning only. What the architecture cannot express is lost."""
        config = _in_schemes(config, self.schemes)
        document = {"model_type": self.name} | {key.name: key.write(config) for key in self.keys}
        for rule in self.rules:
            document |= rule.write(config)
        return document

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes its models follow."""
        if "scheme" in self.constants:
            return (self.constants["scheme"],)
        return tuple(scheme for rule in self.rules for scheme in getattr(rule, "schemes", ()))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes whose checkpoints hold these tensors: the language model, and the model without its head."""
        bare = self.class_name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return (self.class_name, *self.classes, *([] if bare == self.class_name else [f"{bare}Model"]))

    @property
    def _own_names(self) -> set[str]:
        """The keys that keys and rules read."""
        return {name for part in (*self.keys, *self.rules) for name in part.names}

    @property
    def _known(self) -> set[str]:
        """Every key that config.json may hold, but those of one value."""
        return {"model_type"} | self._own_names | COMMON_HARMLESS | set(self.harmless)

    def _check(self, document: Json, source: str) -> None:
        """Raise UserError for a key that is not known, or has a value that is not implemented."""
        own = self._own_names | set(self.harmless)
        fixed = {name: right for name, right in COMMON_FIXED.items() if name not in own} | dict(self.fixed)
        known = self._known
        for name, value in document.items():
            if name in fixed:
                right = fixed[name]
                if not (right(value, document) if callable(right) else value == right):
                    raise UserError(f"{source}: {name}={value!r:.80} is not implemented for {self.name}")
            elif name not in known:
                ignored = shortened(name)
                right = (
                    f"might change what the model computes; if it does not, load with ignore_keys=[{ignored!r}], or "
                    f"convert with --ignore-key {ignored}"
                )
                raise UserError(f"{source}: {ignored}={value!r:.80} is not known for {self.name} and {right}")


def _in_schemes(config: ModelConfig, names: Sequence[str]) -> ModelConfig:
    """The config under whichever of these schemes places the norms as its own does, otherwise as it is."""
    for name in names:
        if SCHEMES[name].placements(config.num_layers, branch_multiplier=config.branch_multiplier) == config.placements:
            return dataclasses.replace(config, scheme=name, ramp_steps=None, ramp_at=None)
    return config
