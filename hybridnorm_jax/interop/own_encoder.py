"""What config.json of our own PyTorch code means as an EncoderConfig: the keys besides those of a decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.interop.hf_config_keys import Json, Key, none
from hybridnorm_jax.interop.own_architecture import (
    CODE_FILES,
    KEYS,
    KEYS_READ_APART,
    OWN,
    OwnArchitecture,
)
from hybridnorm_jax.interop.tensor_parts import HYBRIDNORM_ENCODER
from hybridnorm_jax.interop.vision_keys import Labels, Sizes
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder_config import (
    DECODER_ONLY,
    ENCODER_POSITIONS,
    POOLINGS,
    POSITION_SCOPES,
    EncoderConfig,
)

# The files of pytorch/ that are copied beside the weights of an encoder: without the decoders' own.
ENCODER_CODE_FILES = (
    *(name for name in CODE_FILES if name != "modeling_hybridnorm.py"),
    "encoder_configuration_hybridnorm.py",
    "encoder_hybridnorm.py",
    "encoder_parts_hybridnorm.py",
)
POOLING_NORMS = ("rmsnorm", "layernorm")


@dataclasses.dataclass(frozen=True)
class _Heads:
    """architectures, which says whether there is a head, of how many classes, and whether there is a second one.

    Attributes:
      with_head: the class of our code that has a head.
      bare: the one that has none.
    """

    with_head: str
    bare: str

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return ("architectures", "distillation_head", *Labels().names)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.num_classes and model.distillation_head; registry.check_class refuses a class that is neither."""
        if document.get("architectures") != [self.with_head]:
            # What is said of heads then is of those that this model once had.
            return {"num_classes": None, "distillation_head": False}
        distillation_head = Key("distillation_head", (), False).read(document, source)
        return {**Labels().read(document, source, fields), "distillation_head": distillation_head}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model."""
        if getattr(config, "num_classes", None) is None:
            return {"architectures": [self.bare]}
        second = {"distillation_head": getattr(config, "distillation_head", False)}
        return {"architectures": [self.with_head], **second, **Labels().write(config)}


def _word(name: str, default: str, known: tuple[str, ...]) -> Key:
    return Key(name, (name,), default, words={word: word for word in known})


# Of every encoder. The defaults are those of the classes of encoder_configuration_hybridnorm.py.
ENCODER_KEYS = (
    Key("head_bias", ("head_bias",), True),
    _word("positions", "learned", ENCODER_POSITIONS),
    Key("causal", ("causal",), False),
    Key("class_token", ("class_token",), True),
    Key("distillation_token", ("distillation_token",), False),
    Key("register_tokens", ("register_tokens",), 0),
    _word("position_scope", "all", POSITION_SCOPES),
    Key("norm_pooled_only", ("norm_pooled_only",), False),
    _word("pooling", "class", POOLINGS),
    Key("pooling_norm", ("pooling_norm",), None, null=none, words={word: word for word in POOLING_NORMS}),
)
# Of one of images, and of one of tokens.
IMAGE_KEYS = (
    Key("num_channels", ("num_channels",), 3),
    Key("patch_bias", ("patch_bias",), True),
    Key("mask_token", ("mask_token",), False),
)
TEXT_KEYS = (Key("vocab_size", ("vocab_size",), 49408), Key("end_token", ("end_token",), None, null=none))
_OTHERS = {name for key in (*ENCODER_KEYS, *TEXT_KEYS) for name in key.names}
_NOT_OF_ENCODERS = {*DECODER_ONLY, "alibi_max", "alibi_scale", "alibi_bfloat16"}
_SHARED = tuple(key for key in KEYS if key.name not in _OTHERS and not set(key.fields) & _NOT_OF_ENCODERS)
_CONFIGURATIONS, _MODELS = "encoder_configuration_hybridnorm", "encoder_hybridnorm"

OWN_IMAGE_ENCODER = OwnArchitecture(
    name="hybridnorm_image_encoder",
    class_name="HybridNormForImageClassification",
    classes=("HybridNormImageEncoder",),
    config_class=EncoderConfig,
    family=OWN.family,
    constants={"input": "pixels"},
    keys=(*_SHARED, *ENCODER_KEYS, *IMAGE_KEYS, *KEYS_READ_APART),
    rules=(
        Sizes(image=224, patch=16),
        _Heads(with_head="HybridNormForImageClassification", bare="HybridNormImageEncoder"),
    ),
    tensors=HYBRIDNORM_ENCODER,
    fixed={**OWN.fixed, "tie_word_embeddings": False},
    harmless=OWN.harmless,
    code_files=ENCODER_CODE_FILES,
    # A head that is not there is drawn, and one that is there may be left out.
    auto_map={
        "AutoConfig": f"{_CONFIGURATIONS}.HybridNormImageEncoderConfig",
        "AutoModel": f"{_MODELS}.HybridNormImageEncoder",
        "AutoModelForImageClassification": f"{_MODELS}.HybridNormForImageClassification",
    },
)
OWN_TEXT_ENCODER = dataclasses.replace(
    OWN_IMAGE_ENCODER,
    name="hybridnorm_text_encoder",
    class_name="HybridNormForSequenceClassification",
    classes=("HybridNormTextEncoder",),
    constants={"input": "tokens"},
    keys=(*_SHARED, *ENCODER_KEYS, *TEXT_KEYS, *KEYS_READ_APART),
    rules=(_Heads(with_head="HybridNormForSequenceClassification", bare="HybridNormTextEncoder"),),
    auto_map={
        "AutoConfig": f"{_CONFIGURATIONS}.HybridNormTextEncoderConfig",
        "AutoModel": f"{_MODELS}.HybridNormTextEncoder",
        "AutoModelForSequenceClassification": f"{_MODELS}.HybridNormForSequenceClassification",
    },
)
OWN_ENCODERS = (OWN_IMAGE_ENCODER, OWN_TEXT_ENCODER)
