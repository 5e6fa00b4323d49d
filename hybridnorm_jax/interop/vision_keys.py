"""How a Hugging Face config.json of an encoder states what no single key of ours is, such as sizes and labels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.hf_config_keys import Json, Key
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder_config import LARGEST_IMAGE

MOST_LABELS = 1_000_000
LARGEST_RATIO = 1024


@dataclasses.dataclass(frozen=True)
class Sizes:
    """image_size and patch_size: one number for height and width or, where the class takes that, a list of both.

    Attributes:
      image, patch: where the keys are absent.
      may_be_list: the class takes lists.
      is_square: the class would interpolate the positions of an image whose height is not its width.
    """

    image: int
    patch: int
    may_be_list: bool = True
    is_square: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return ("image_size", "patch_size")

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.image_size and model.patch_size."""
        image = self._pair(document, source, "image_size", self.image)
        patch = self._pair(document, source, "patch_size", self.patch)
        if self.is_square and image[0] != image[1]:
            right = "must be square: for others this class interpolates its positions, which is not implemented"
            raise UserError(f"{source}: image_size={list(image)} {right}")
        return {"image_size": image, "patch_size": patch}

    def _pair(self, document: Json, source: str, name: str, default: int) -> tuple[int, int]:
        value = document.get(name, default)
        if isinstance(value, list) and self.may_be_list and len(value) == 2:
            first, second = (self._number(each, source, name) for each in value)
            return first, second
        if isinstance(value, list):
            right = "must be [height, width]" if self.may_be_list else "must be one number for height and width"
            raise UserError(f"{source}: {name}={value!r:.80} {right}")
        number = self._number(value, source, name)
        return number, number

    def _number(self, value: Any, source: str, name: str) -> int:
        number: int = Key(name, (), 1, least=1, most=LARGEST_IMAGE).read({name: value}, source)
        return number

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; where a list is needed that the class does not take, the first of its numbers."""
        sizes = {name: list(getattr(config, name)) for name in self.names}
        whole = {name: pair[0] == pair[1] or not self.may_be_list for name, pair in sizes.items()}
        return {name: pair[0] if whole[name] else pair for name, pair in sizes.items()}


@dataclasses.dataclass(frozen=True)
class Labels:
    """id2label, of which a model has as many classes; two where it is absent, and num_labels is too."""

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return ("id2label", "num_labels")

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.num_classes."""
        labels, stated = document.get("id2label"), document.get("num_labels")
        if labels is not None and not isinstance(labels, Mapping):
            raise UserError(f"{source}: id2label={labels!r:.80} must be a map of numbers to labels")
        count = 2 if stated is None else Key("num_labels", (), 2, most=MOST_LABELS).read(document, source)
        if labels is not None and stated not in (None, len(labels)):
            raise UserError(f"{source}: num_labels={stated!r:.80}, but id2label has {len(labels)}")
        count = count if labels is None else len(labels)
        if not 1 <= count <= MOST_LABELS:
            raise UserError(f"{source}: {count} labels; there must be from 1 to {MOST_LABELS:,}")
        return {"num_classes": count}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """num_labels: so the labels themselves may be given besides."""
        return {"num_labels": getattr(config, "num_classes", None) or 2}


@dataclasses.dataclass(frozen=True)
class Classes:
    """architectures, where several classes of one model_type differ in what they have behind the last norm.

    Attributes:
      fields: class -> fields of EncoderConfig. The first is meant where architectures is absent.
    """

    fields: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return ("architectures",)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the class; registry.check_class refuses one that is not among them."""
        stated = document.get("architectures")
        name = stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else None
        return dict(self.fields.get(name or "", next(iter(self.fields.values()))))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The class of a model; the first where none has its fields."""
        for name, fields in self.fields.items():
            if all(getattr(config, key, None) == value for key, value in fields.items()):
                return {"architectures": [name]}
        return {"architectures": [next(iter(self.fields))]}


@dataclasses.dataclass(frozen=True)
class HeadWidth:
    """head_dim, which is no key of the class but is read where a file has it; without it hidden_size // heads."""

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return ("head_dim",)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.head_dim."""
        usual = fields["d_model"] // max(fields["num_heads"], 1)
        return {"head_dim": Key("head_dim", (), usual, least=1).read(document, source)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing where it is as wide as usual."""
        is_usual = config.head_dim == config.d_model // config.num_heads
        return {} if is_usual else {"head_dim": config.head_dim}


@dataclasses.dataclass(frozen=True)
class RatioOfWidth:
    """mlp_ratio and use_swiglu_ffn: feed-forward layers of so many times the width, gated ones of two thirds of that.

    Attributes:
      words: hidden_act -> our activation of layers without a gate.
    """

    words: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return ("mlp_ratio", "use_swiglu_ffn", "hidden_act")

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.mlp_dim and model.activation."""
        ratio = Key("mlp_ratio", (), 4, least=1, most=LARGEST_RATIO).read(document, source)
        gated = Key("use_swiglu_ffn", (), False).read(document, source)
        if gated:  # hidden_act is not read then
            return {"mlp_dim": _gated_width(fields["d_model"], ratio), "activation": "swiglu"}
        activation = Key("hidden_act", (), "gelu", words=self.words).read(document, source)
        return {"mlp_dim": fields["d_model"] * ratio, "activation": activation}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; a ratio that means another width where none means its own."""
        if config.activation == "swiglu":
            fitting = [r for r in range(1, LARGEST_RATIO) if _gated_width(config.d_model, r) == config.mlp_dim]
            return {"use_swiglu_ffn": True, "mlp_ratio": fitting[0] if fitting else 4}
        activation = Key("hidden_act", ("activation",), "gelu", words=self.words).write(config)
        ratio = min(max(config.mlp_dim // config.d_model, 1), LARGEST_RATIO)
        return {"use_swiglu_ffn": False, "mlp_ratio": ratio, "hidden_act": activation}


def _gated_width(width: int, ratio: int) -> int:
    """Two thirds of ratio * width, rounded up to a multiple of 8."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8


@dataclasses.dataclass(frozen=True)
class EndToken:
    """eos_token_id of CLIP's text tower: the first such token is pooled. As it once was, 2 means the largest id.

    Attributes:
      default: where the key is absent.
    """

    default: int

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return ("eos_token_id",)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.end_token."""
        token = Key("eos_token_id", (), self.default, least=0).read(document, source)
        return {"end_token": None if token == 2 else token}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The key."""
        token = getattr(config, "end_token", None)
        return {"eos_token_id": 2 if token is None else token}
