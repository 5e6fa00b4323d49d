"""Encoders as our own PyTorch code has them, and what our Encoder makes of the same parameters."""

from pathlib import Path

import jax
import numpy as np
from exported_models import BIASES, COMPRESSED, EXPERTS, Exported, draw, torch, transformers

import hybridnorm_jax as hn
from hybridnorm_jax.interop.huggingface import save_huggingface
from hybridnorm_jax.interop.own_encoder import OWN_IMAGE_ENCODER
from hybridnorm_jax.interop.tensor_places import leaf_shapes

SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48}
IMAGES = {"image_size": (13, 8), "patch_size": (4, 2), "num_channels": 2}
TEXT = {"input": "tokens", "vocab_size": 61, "max_positions": 20, "class_token": False, "pooling": "mean"}
WITHOUT_TABLE = {"positions": "rope", "max_positions": None}
LAYERNORM = {"norm": "layernorm", "norm_bias": True, "activation": "gelu", "attention_bias": True, "mlp_bias": True}
# Every kind of encoder: each key of EncoderConfig has another value than usual in one of them.
KINDS = {
    "hybrid": {"scheme": "hybrid", "num_classes": 5},
    "hybrid_star": {"scheme": "hybrid_star", **LAYERNORM, "num_classes": 5},
    "post": {"scheme": "post", **LAYERNORM, "num_classes": 5, "pooling": "mean"},
    "span": {"scheme": "span", "num_classes": 1, "head_bias": False},
    "peri": {"scheme": "peri", "patch_bias": False, "pooling": "mean"},
    "keel": {"scheme": "keel", "num_kv_heads": 2, "pooling": "class_and_mean"},
    "parallel": {"scheme": "parallel_one_norm", **LAYERNORM, "outer_norm_scale": False},
    "every_head_norm": {"scheme": "pre_qkvc_post", "outer_norm_bias": True, "dropout": 0.25},
    "two_heads": {
        **{"scheme": "pre", **LAYERNORM, "num_classes": 5, "distillation_token": True, "distillation_head": True},
        **{"register_tokens": 3, "position_scope": "patches"},
    },
    "masked": {"scheme": "pre", "mask_token": True, "register_tokens": 2, "layer_scale": True},
    "nothing_pooled": {"scheme": "pre", "pooling": "none", "class_token": False, "embedding_norm": "true"},
    "attention_pooling": {"scheme": "pre", "pooling": "attention", "class_token": False, "num_classes": 5},
    "attention_pooling_with_layernorm": {
        **{"scheme": "sandwich", **LAYERNORM, "pooling": "attention", "norm_scale_plus_one": True},
        "pooling_norm": "rmsnorm",
    },
    "dyt": {"scheme": "hybrid", "norm": "dyt", "norm_bias": True, "num_classes": 5, "pooling": "mean"},
    "gated_with_a_probe": {
        **{"scheme": "peri", "norm": "gated", "attention_norm": "derf", "pooling": "attention"},
        **{"pooling_norm": "layernorm", "class_token": False},
    },
    "centred": {"scheme": "pre", "embedding_centring": True, "norm_pooled_only": True},
    "compressed": {"scheme": "pre", **COMPRESSED, "pooling": "mean"},
    "compressed_within": {"scheme": "pre", **COMPRESSED, "whole_outside": True, "num_classes": 5},
    "padded_within": {
        **{"scheme": "pre", **COMPRESSED, "d_model": 40, "whole_outside": True, "pooling": "attention"},
        **{"pooling_norm": "layernorm", "embedding_norm": "true", "embedding_centring": True},
    },
    "rotated": {"scheme": "pre_qk_pre", "positions": "rope", "register_tokens": 1, "windows": (5, 0)},
    "causal_images": {"scheme": "pre", "causal": True, "windows": (0, 3), "score_cap": 1.5, "num_kv_heads": 2},
    "sinks": {"scheme": "pre", "attention_sinks": True, "score_cap": 2.5, "windows": (0, 4)},
    "experts": {"scheme": "hybrid", **EXPERTS, **BIASES, "shared_experts": 1, "dense_layers": (1,), "num_classes": 5},
    "text": {**TEXT, "scheme": "span", "num_classes": 5},
    "text_at_its_end": {**TEXT, "scheme": "pre", **LAYERNORM, "pooling": "end", "end_token": 7, "causal": True},
    "text_at_its_largest": {**TEXT, "scheme": "pre", "pooling": "end", "register_tokens": 2, "norm_pooled_only": True},
    "text_with_class_token": {
        **{**TEXT, **WITHOUT_TABLE, "scheme": "hybrid", "class_token": True, "pooling": "class_and_mean"},
        **{"register_tokens": 1, "windows": (4, 0)},
    },
    "text_read_by_a_probe": {**TEXT, "scheme": "pre", "pooling": "attention", "class_token": True},
    "text_positions_behind_the_class_token": {
        **TEXT,
        **{"scheme": "pre", "class_token": True, "pooling": "class", "position_scope": "patches", "num_classes": 5},
    },
}
_RANDOM = np.random.default_rng(3)
TOKENS = _RANDOM.integers(0, 60, (3, 11)).astype(np.int32)
TOKENS[0, 4] = TOKENS[0, 8] = TOKENS[1, 2] = 7
TOKENS[:, 6] = TOKENS[:, 9] = 60


def config_of(name, **keys):
    """The encoder of a name of KINDS."""
    kind = KINDS[name]
    images = {} if kind.get("input") == "tokens" else IMAGES
    return hn.EncoderConfig(**(SIZES | images | kind | keys))


def inputs_of(config, seed=5):
    """Pixels with the channels last, or tokens."""
    if not config.reads_pixels:
        return TOKENS
    shape = (3, *config.image_size, config.num_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(config.param_dtype)


def in_their_layout(inputs):
    """Tokens as torch wants them; pixels with the channels behind the batch."""
    inputs = np.asarray(inputs)
    return torch.tensor(inputs, dtype=torch.long) if inputs.ndim == 2 else torch.tensor(np.moveaxis(inputs, 3, 1))


def named(output):
    """What our Encoder gives, by transformers' names."""
    if not isinstance(output, hn.EncoderOutput):
        return {"logits": output}
    found = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooled}
    return {name: array for name, array in found.items() if array is not None}


def export(directory, config, params=None, **keys):
    """The encoder, written to a new directory as our own code."""
    params = draw(config) if params is None else jax.tree.map(np.asarray, params)
    save_huggingface(directory, config, params, architecture="hybridnorm", **keys)
    return Exported(config, params, Path(directory))


def auto_class(config):
    """Which of transformers' Auto classes loads it."""
    if config.num_classes is None:
        return transformers.AutoModel
    if config.reads_pixels:
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def in_torch(exported, **keys):
    """The encoder of a directory, as transformers loads it: everything is there, and nothing is left over."""
    auto = auto_class(exported.config)
    model, found = auto.from_pretrained(exported.directory, trust_remote_code=True, output_loading_info=True, **keys)
    assert {key: list(value) for key, value in found.items() if value} == {}
    assert not model.training
    return model


def losses(outputs):
    """The sum of the mean squares of all outputs, of either side."""
    return sum((array**2).mean() for array in outputs.values())


def as_leaves(config, tensors):
    """Tensors of our PyTorch code by name, as the leaves of our tree by path; zeros where there is none."""
    leaves = {path: np.zeros(shape, np.float64) for path, shape in leaf_shapes(config).items()}
    table = OWN_IMAGE_ENCODER.tensors  # that of text encoders, too
    for place in table.places(config):
        name = place.name if config.num_classes is not None else place.name.removeprefix(table.prefix)
        if tensors.get(name) is not None:
            place.read(tensors[name].detach().double().numpy(), place.targets(leaves))
    return leaves
