"""Encoders: ViT, DeiT, DINOv2, the towers of SigLIP and CLIP."""

from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.interop.architectures.usual_keys import GELUS, LAYER_NORM, layer_norm_eps, ungated
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import MOST_LAYERS, MOST_POSITIONS, Key, names
from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS, LINEAR, LINEAR_OUT, PATCHES, VECTOR, AsItIs
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    DOWN,
    FEED_FORWARD_NORM,
    GATE,
    KEY,
    OUT,
    QUERY,
    UP,
    VALUE,
    dense,
    embedding,
    norm,
    only,
    plain_mlp,
    separate_qkv,
)
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable
from hybridnorm_jax.interop.vision_keys import Classes, EndToken, HeadWidth, Labels, RatioOfWidth, Sizes
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig

_ONE_IN_FRONT = AsItIs(ones=1)
_ENCODER: Mapping[str, Any] = {
    **LAYER_NORM,
    "scheme": "pre",
    "positions": "learned",
    "attention_bias": True,
    "mlp_bias": True,
}
# Dropout, and how a class starts or is trained.
_TRAINING = "attention_probs_dropout_prob hidden_dropout_prob drop_path_rate initializer_factor tie_word_embeddings"
_NOT_CAUSAL = {"is_causal": False}


def _sizes(*, width: int = 768, mlp: int | None = 3072, layers: int = 12, heads: int = 12) -> tuple[Key, ...]:
    """The sizes of a trunk; an absent key means these."""
    keys = (
        Key("hidden_size", ("d_model",), width),
        Key("num_hidden_layers", ("num_layers",), layers, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), heads),
    )
    return keys if mlp is None else (*keys, Key("intermediate_size", ("mlp_dim",), mlp))


_CHANNELS = Key("num_channels", ("num_channels",), 3)
_QKV_BIAS = Key("qkv_bias", ("attention_bias",), True)

# ---- ViT and those after it.


def _patches(name: str) -> tuple[Tensor, ...]:
    """The convolution that embeds patches."""
    return (
        Tensor(f"{name}.weight", ("patch_embedding/kernel",), PATCHES),
        Tensor(f"{name}.bias", ("patch_embedding/bias",), VECTOR),
    )


def _learned(name: str, leaf: str) -> Tensor:
    """Learned tokens, or positions, with an axis for the batch in front."""
    return Tensor(name, (f"{leaf}/embedding",), _ONE_IN_FRONT)


def _vit_table(prefix: str, *block: tuple[Tensor, ...], outer: tuple[Tensor, ...] = ()) -> TensorTable:
    """The tensors of a model that names them as ViT does."""
    return TensorTable(
        prefix=f"{prefix}.",
        outer=(
            _learned(f"{prefix}.embeddings.position_embeddings", "position_embedding"),
            *_patches(f"{prefix}.embeddings.patch_embeddings.projection"),
            _learned(f"{prefix}.embeddings.cls_token", "class_token"),
            *outer,
            *norm(f"{prefix}.layernorm", "final_norm"),
        ),
        block=tuple(tensor for part in (_VIT_ATTENTION, *block) for tensor in part),
        layer=f"{prefix}.encoder.layer.{{}}.",
        head="classifier.weight",
        buffers=r"(?!)",
    )


_VIT_ATTENTION = (
    *dense("attention.attention.query", QUERY),
    *dense("attention.attention.key", KEY),
    *dense("attention.attention.value", VALUE),
    *dense("attention.output.dense", OUT, kernel=LINEAR_OUT),
)
_VIT_REST = (
    *norm("layernorm_before", ATTENTION_NORM),
    *norm("layernorm_after", FEED_FORWARD_NORM),
    *plain_mlp("intermediate.dense", "output.dense"),
)
_CLASSIFIER = dense("classifier", "head")
_VIT_KEYS = (*_sizes(), layer_norm_eps(1e-12), ungated("hidden_act", "gelu"), _CHANNELS, _QKV_BIAS)
# What the bare model has behind its last norm, and no classifier.
_VIT_HARMLESS = names(f"encoder_stride pooler_output_size pooler_act {_TRAINING}")

_VIT = Architecture(
    name="vit",
    class_name="ViTForImageClassification",
    config_class=EncoderConfig,
    summary="an encoder of images with a class token and a classifier",
    constants={**_ENCODER, "attention_output_bias": True},
    keys=_VIT_KEYS,
    rules=(Sizes(image=224, patch=16), HeadWidth(), Labels()),
    tensors=_vit_table("vit", _VIT_REST, outer=_CLASSIFIER),
    fixed=_NOT_CAUSAL,
    harmless=_VIT_HARMLESS,
)


def _has_two_heads(config: ModelConfig) -> bool:
    return isinstance(config, EncoderConfig) and config.distillation_head


def _has_one_head(config: ModelConfig) -> bool:
    return not _has_two_heads(config)


_DEIT_CLASSES = Classes(
    {
        "DeiTForImageClassification": {"distillation_head": False},
        "DeiTForImageClassificationWithTeacher": {"distillation_head": True},
    }
)
_DEIT = Architecture(
    name="deit",
    class_name="DeiTForImageClassification",
    config_class=EncoderConfig,
    classes=tuple(_DEIT_CLASSES.fields),
    summary="as vit with a distillation token; with one classifier, or with two whose logits are averaged",
    constants={**_VIT.constants, "distillation_token": True},
    keys=_VIT_KEYS,
    rules=(*_VIT.rules, _DEIT_CLASSES),
    tensors=_vit_table(
        "deit",
        _VIT_REST,
        outer=(
            _learned("deit.embeddings.distillation_token", "distillation_token"),
            *only(_has_one_head, *dense("classifier", "head")),
            *only(_has_two_heads, *dense("cls_classifier", "head")),
            *dense("distillation_classifier", "distillation_head"),
        ),
    ),
    fixed=_NOT_CAUSAL,
    harmless=_VIT_HARMLESS,
)


def _is_gated(config: ModelConfig) -> bool:
    return config.is_gated


def _is_not_gated(config: ModelConfig) -> bool:
    return not config.is_gated


_DINOV2 = Architecture(
    name="dinov2",
    class_name="Dinov2ForImageClassification",
    config_class=EncoderConfig,
    summary="an encoder of images with LayerScale; its classifier reads the class token and the mean of the patches",
    constants={**_VIT.constants, "layer_scale": True, "pooling": "class_and_mean"},
    keys=(
        *_sizes(mlp=None),
        layer_norm_eps(1e-6),
        _CHANNELS,
        _QKV_BIAS,
        Key("use_mask_token", ("mask_token",), True),
    ),
    rules=(RatioOfWidth(GELUS), Sizes(image=224, patch=14, is_square=True), HeadWidth(), Labels()),
    tensors=_vit_table(
        "dinov2",
        (*norm("norm1", ATTENTION_NORM), *norm("norm2", FEED_FORWARD_NORM)),
        only(_is_not_gated, *plain_mlp("mlp.fc1", "mlp.fc2")),
        only(_is_gated, *dense("mlp.weights_in", GATE, UP), *dense("mlp.weights_out", DOWN)),
        (
            Tensor("layer_scale1.lambda1", ("attention_layer_scale/scale",), VECTOR),
            Tensor("layer_scale2.lambda1", ("feed_forward_layer_scale/scale",), VECTOR),
        ),
        outer=(
            Tensor("dinov2.embeddings.mask_token", ("mask_token/embedding",), AS_IT_IS),
            *_CLASSIFIER,
        ),
    ),
    fixed=_NOT_CAUSAL,
    # How the scales start, and what a backbone gives.
    harmless=names(
        f"layerscale_value apply_layernorm reshape_hidden_states out_features out_indices stage_names {_TRAINING}"
    ),
)

# ---- Towers.

_TOWER_BLOCK = (
    *norm("layer_norm1", ATTENTION_NORM),
    *norm("layer_norm2", FEED_FORWARD_NORM),
    *separate_qkv(),
    *dense("self_attn.out_proj", OUT, kernel=LINEAR_OUT),
    *plain_mlp("mlp.fc1", "mlp.fc2"),
)


def _tower_table(older_prefix: str, *outer: tuple[Tensor, ...]) -> TensorTable:
    """The tensors of a tower, whose names have no prefix, with these outside the blocks."""
    return TensorTable(
        prefix="",
        outer=(
            *embedding("embeddings.position_embedding", "position_embedding"),
            *(tensor for part in outer for tensor in part),
        ),
        block=_TOWER_BLOCK,
        layer="encoder.layers.{}.",
        head="",
        buffers=r"embeddings\.position_ids",
        older_prefix=older_prefix,
    )


_PROBE_ATTENTION = tuple(f"pooling/attention/{name}" for name in ("query", "key", "value"))
_SIGLIP_VISION = Architecture(
    name="siglip_vision_model",
    class_name="SiglipVisionModel",
    config_class=EncoderConfig,
    summary="an encoder of images, pooled by a learned query",
    constants={**_ENCODER, "class_token": False},
    keys=(
        *_sizes(),
        layer_norm_eps(1e-6),
        ungated("hidden_act", "gelu_pytorch_tanh"),
        _CHANNELS,
        Key("vision_use_head", ("pooling",), True, words={True: "attention", False: "none"}),
    ),
    rules=(Sizes(image=224, patch=16, may_be_list=False),),
    tensors=_tower_table(
        "vision_model.",
        _patches("embeddings.patch_embedding"),
        norm("post_layernorm", "final_norm"),
        (
            _learned("head.probe", "pooling/probe"),
            Tensor("head.attention.in_proj_weight", tuple(f"{leaf}/kernel" for leaf in _PROBE_ATTENTION), LINEAR),
            Tensor("head.attention.in_proj_bias", tuple(f"{leaf}/bias" for leaf in _PROBE_ATTENTION), VECTOR),
        ),
        dense("head.attention.out_proj", "pooling/attention/out", kernel=LINEAR_OUT),
        norm("head.layernorm", "pooling/norm"),
        dense("head.mlp.fc1", "pooling/feed_forward/up"),
        dense("head.mlp.fc2", "pooling/feed_forward/down"),
    ),
    fixed=_NOT_CAUSAL,
    harmless=names(_TRAINING),
)

_CLIP_VISION = Architecture(
    name="clip_vision_model",
    class_name="CLIPVisionModel",
    config_class=EncoderConfig,
    summary="an encoder of images with a norm after the embedding; the class token is pooled",
    constants={**_ENCODER, "patch_bias": False, "embedding_norm": "true", "norm_pooled_only": True},
    keys=(*_sizes(), layer_norm_eps(), ungated("hidden_act", "quick_gelu"), _CHANNELS),
    rules=(Sizes(image=224, patch=32, may_be_list=False),),
    tensors=_tower_table(
        "vision_model.",
        _patches("embeddings.patch_embedding"),
        (Tensor("embeddings.class_embedding", ("class_token/embedding",), VECTOR),),
        norm("pre_layrnorm", "embedding_norm"),
        norm("post_layernorm", "final_norm"),
    ),
    fixed=_NOT_CAUSAL,
    harmless=names(f"projection_dim {_TRAINING}"),
)

_CLIP_TEXT = Architecture(
    name="clip_text_model",
    class_name="CLIPTextModel",
    config_class=EncoderConfig,
    summary="an encoder of tokens with a causal mask; the token at the end is pooled",
    constants={**_ENCODER, "input": "tokens", "class_token": False, "causal": True, "pooling": "end"},
    keys=(
        Key("vocab_size", ("vocab_size",), 49408),
        *_sizes(width=512, mlp=2048, heads=8),
        Key("max_position_embeddings", ("max_positions",), 77, most=MOST_POSITIONS),
        layer_norm_eps(),
        ungated("hidden_act", "quick_gelu"),
    ),
    rules=(EndToken(49407),),
    tensors=_tower_table(
        "text_model.", embedding("embeddings.token_embedding"), norm("final_layer_norm", "final_norm")
    ),
    harmless=names(f"projection_dim {_TRAINING}"),
)

ENTRIES = (_VIT, _DEIT, _DINOV2, _SIGLIP_VISION, _CLIP_VISION, _CLIP_TEXT)
