"""The table of all architectures, and which of them a config.json or a model is."""

from collections.abc import Collection, Mapping
from typing import Any

from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.architectures import (
    alibi,
    cohere,
    experts,
    fairseq,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    olmo,
    phi,
    vision,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import Json
from hybridnorm_jax.interop.mathematics import mathematics
from hybridnorm_jax.interop.own_architecture import OWN
from hybridnorm_jax.interop.own_encoder import OWN_ENCODERS
from hybridnorm_jax.model.config import ModelConfig

_FAMILIES = (gpt2, gpt_neox, fairseq, llama, olmo, experts, phi, alibi, cohere, gemma, vision)
# A model that several express is written as the first of them.
ARCHITECTURES: Mapping[str, Architecture] = {entry.name: entry for family in _FAMILIES for entry in family.ENTRIES}
# Those of transformers first: they need no code of ours.
ALL: Mapping[str, Architecture] = {**ARCHITECTURES, **{entry.name: entry for entry in (OWN, *OWN_ENCODERS)}}


def architecture_of(document: Any, source: str) -> Architecture:
    """The architecture that a config.json names.

    Raises:
      UserError: it names none, or one that is not supported.
    """
    if not isinstance(document, Mapping):
        raise UserError(f"{source}: must hold a mapping of keys to values")
    name = document.get("model_type")
    if not isinstance(name, str) or name not in ALL:
        raise UserError(f"{source}: model_type={name!r:.80} is not supported; supported: {', '.join(ALL)}")
    return ALL[name]


def check_class(document: Mapping[str, Any], source: str) -> None:
    """Raise UserError unless `architectures` names one class, and its tensors are those of model_type.

    A checkpoint of a classifier or of an encoder and decoder has the model_type of its language model.
    """
    architecture = architecture_of(document, source)
    stated, right = document.get("architectures"), f"must be [{architecture.class_name!r}], the class of its tensors"
    if stated is None:
        raise UserError(f"{source}: architectures is missing; it {right}")
    if not isinstance(stated, list) or len(stated) != 1:
        raise UserError(f"{source}: architectures={stated!r:.80} {right}")
    if stated[0] not in architecture.class_names:
        raise UserError(f"{source}: architectures={stated!r:.80}: with model_type={architecture.name} it {right}")


def config_from_json(document: Any, source: str, ignore_keys: Collection[str] = ()) -> tuple[str, ModelConfig]:
    """The architecture's name and the model of a config.json.

    Args:
      document: what the file holds.
      source: the file, for messages.
      ignore_keys: keys to read as if they were absent.

    Raises:
      UserError: a key or value that is not understood; the message names `source` and the key.
    """
    architecture = architecture_of(document, source)
    if "model_type" in ignore_keys:
        raise UserError(f"{source}: model_type cannot be ignored: it says what all other keys mean")
    kept = {name: value for name, value in document.items() if name not in ignore_keys}
    return architecture.name, architecture.read(kept, source)


def config_to_json(config: ModelConfig, architecture: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of the first architecture, or of the one named, that expresses the model.

    An architecture expresses a model if its config.json read back has the same mathematics. Our own come last and
    express every model; "hybridnorm" names that of decoders and those of encoders.

    Raises:
      UserError: the one that is named does not; the message says what it lacks.
    """
    if architecture is not None and architecture not in ALL:
        raise UserError(f"architecture={architecture} is not supported; supported: {', '.join(ALL)}")
    lost: list[str] = []
    of_this_kind = [entry for entry in ALL.values() if entry.config_class is type(config)]
    asked = [entry for entry in of_this_kind if architecture in (None, entry.name, entry.family)]
    if not asked:
        raise UserError(f"architecture={architecture} is not of models with an {type(config).__name__}")
    ours = mathematics(config)
    for entry in asked:
        document = entry.write(config)
        lost = _lost(config, ours, entry, document)
        if not lost:
            return entry.name, document
    raise UserError(f"{asked[-1].name} cannot express {' or '.join(lost[:3])}")


def _lost(config: ModelConfig, ours: Mapping[str, Any], architecture: Architecture, document: Json) -> list[str]:
    """`model.key=value` of everything that this config.json does not say as the config does.

    Args:
      ours: the mathematics of the config.
    """
    try:
        back = mathematics(architecture.read(document, "config.json"))
    except UserError as error:
        # A compressed stream has sizes that no other norm's has, which would be named instead.
        other_norm = config.norm != architecture.constants.get("norm", config.norm)
        return [f"model.norm={config.norm}" if other_norm else f"the model ({error})"]
    # A key with an effect in one of the two only follows from another that differs: the scheme, or the positions.
    lost = [name for name in ours if name in back and ours[name] != back[name]]
    return [f"model.{name}={spelled(getattr(config, name))}" for name in lost]
