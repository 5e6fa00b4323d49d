"""The keys of every encoder of transformers that is read, drawn at random: DRAWS has a function for each class."""

from drawn_keys import ACTIVATIONS, eps, flag, heads_of, pick


def _trunk(rng):
    heads, _, head_dim = heads_of(rng)
    return {
        "hidden_size": heads * head_dim,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 40)),
        "hidden_act": pick(rng, *ACTIVATIONS),
        "layer_norm_eps": eps(rng),
    }


def _images(rng, *, is_square=True):
    """Sizes of images that patches need not fill."""
    height, width = int(rng.integers(9, 20)), int(rng.integers(9, 20))
    patch, patch_width = int(rng.integers(3, 9)), int(rng.integers(3, 9))
    sizes = {"image_size": height, "patch_size": patch}
    if not is_square:
        sizes = {"image_size": pick(rng, height, [height, width]), "patch_size": pick(rng, patch, [patch, patch_width])}
    return sizes | {"num_channels": pick(rng, 1, 2, 3)}


def _vit(rng):
    return _trunk(rng) | _images(rng, is_square=False) | {"qkv_bias": flag(rng), "num_labels": pick(rng, 1, 2, 7)}


def _dinov2(rng):
    keys = _trunk(rng) | _images(rng)
    del keys["intermediate_size"]
    keys |= {"mlp_ratio": pick(rng, 1, 2, 3), "use_swiglu_ffn": flag(rng), "use_mask_token": flag(rng)}
    return keys | {"qkv_bias": flag(rng), "num_labels": pick(rng, 1, 2, 7)}


def _siglip_vision(rng):
    return _trunk(rng) | _images(rng) | {"vision_use_head": flag(rng)}


def _clip_vision(rng):
    return _trunk(rng) | _images(rng)


def _clip_text(rng):
    vocabulary = int(rng.integers(20, 70))
    keys = {"vocab_size": vocabulary, "max_position_embeddings": pick(rng, 9, 14)}
    return _trunk(rng) | keys | {"eos_token_id": pick(rng, 2, 7, vocabulary - 1), "pad_token_id": 1, "bos_token_id": 0}


DRAWS = {
    "ViTForImageClassification": _vit,
    "DeiTForImageClassification": _vit,
    "DeiTForImageClassificationWithTeacher": _vit,
    "Dinov2ForImageClassification": _dinov2,
    "SiglipVisionModel": _siglip_vision,
    "CLIPVisionModel": _clip_vision,
    "CLIPTextModel": _clip_text,
}
