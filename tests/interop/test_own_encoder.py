"""config.json of the PyTorch code of encoders: every field of an EncoderConfig is in it, or what it means."""

import dataclasses
import importlib
import json

import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import config_from_json, config_to_json, mathematics
from hybridnorm_jax.interop.own_architecture import NOT_WRITTEN, READ_APART
from hybridnorm_jax.interop.own_encoder import OWN_ENCODERS
from hybridnorm_jax.model.encoder_config import DECODER_ONLY

IMAGES = {"scheme": "hybrid", "d_model": 32, "num_layers": 3, "num_heads": 4, "image_size": 8, "patch_size": 4}
TEXT = {"scheme": "hybrid", "d_model": 32, "num_layers": 3, "num_heads": 4, "input": "tokens", "vocab_size": 61}
TEXT |= {"max_positions": 9}
SMALL = {"norm": "crmsnorm", "d_model": 31, "norm_width": 32, "head_dim": 8}
# Another value of each field that only encoders have, or have in another form, and what else a model with it needs.
OTHER_IMAGES = {
    "causal": {"causal": True},
    "head_bias": {"num_classes": 3, "head_bias": False},
    "positions": {"positions": "rope"},
    "image_size": {"image_size": (8, 12)},
    "patch_size": {"patch_size": (2, 4)},
    "num_channels": {"num_channels": 1},
    "patch_bias": {"patch_bias": False},
    "class_token": {"class_token": False, "pooling": "mean"},
    "distillation_token": {"distillation_token": True},
    "register_tokens": {"register_tokens": 2},
    "mask_token": {"mask_token": True},
    "position_scope": {"position_scope": "patches"},
    "norm_pooled_only": {"norm_pooled_only": True},
    "pooling": {"pooling": "class_and_mean"},
    "pooling_norm": {"pooling": "attention", "pooling_norm": "layernorm"},
    "num_classes": {"num_classes": 2},
    "distillation_head": {"num_classes": 3, "distillation_token": True, "distillation_head": True},
    "outer_norm_scale": {"outer_norm_scale": False},
    "outer_norm_bias": {"outer_norm_bias": True},
    "whole_outside": {**SMALL, "whole_outside": True},
    "embedding_centring": {"embedding_centring": True},
    "rotary_dim": {"positions": "rope", "rotary_dim": 4},
}
OTHER_TEXT = {
    "vocab_size": {"vocab_size": 62},
    "max_positions": {"max_positions": 10},
    "end_token": {"pooling": "end", "end_token": 7},
    "num_classes": {"num_classes": 4},
}
CASES = [(IMAGES, *case) for case in OTHER_IMAGES.items()] + [(TEXT, *case) for case in OTHER_TEXT.items()]
WITHOUT_ALIBI = ("alibi_max", "alibi_scale", "alibi_bfloat16")


def test_every_field_of_an_encoder_is_accounted_for():
    """A new field is written to config.json, or it is said why it need not be."""
    keys = {field for each in OWN_ENCODERS for part in each.keys for field in part.fields}
    by_rules = {"input", "image_size", "patch_size", "num_classes", "distillation_head"}
    left_out = {*NOT_WRITTEN, *DECODER_ONLY, *WITHOUT_ALIBI}
    fields = {field.name for field in dataclasses.fields(hn.EncoderConfig)}
    assert keys | by_rules | set(READ_APART) | left_out == fields
    assert not (keys | by_rules) & left_out
    only = fields - {field.name for field in dataclasses.fields(hn.ModelConfig)}
    assert only - {"input"} <= {*OTHER_IMAGES, *OTHER_TEXT}


@pytest.mark.parametrize(("base", "field", "keys"), CASES)
def test_every_field_that_is_written_comes_back(base, field, keys):
    config, other = hn.EncoderConfig(**base), hn.EncoderConfig(**(base | keys))
    assert getattr(config, field) != getattr(other, field)
    assert mathematics(other) != mathematics(config)
    name, document = config_to_json(other, "hybridnorm")
    assert name == document["model_type"]
    again, back = config_from_json(json.loads(json.dumps(document)), "config.json")
    assert again == name
    assert getattr(back, field) == getattr(other, field)
    assert mathematics(back) == mathematics(other)


@pytest.mark.parametrize("name", ["HybridNormImageEncoderConfig", "HybridNormTextEncoderConfig"])
def test_the_defaults_of_both_sides_are_the_same(name):
    pytest.importorskip("transformers", minversion="5.0")
    theirs = importlib.import_module("hybridnorm_jax.interop.pytorch.encoder_configuration_hybridnorm")
    document = getattr(theirs, name)(max_position_embeddings=197).to_dict()
    _, stated = config_from_json(json.loads(json.dumps(document)), "all keys")
    few = {"model_type": document["model_type"], "max_position_embeddings": 197}
    assert stated == config_from_json(few, "two keys")[1]


def test_architecture_hybridnorm_is_our_own_code_of_any_model():
    assert config_to_json(hn.ModelConfig(), "hybridnorm")[0] == "hybridnorm"
    assert config_to_json(hn.EncoderConfig(**IMAGES), "hybridnorm")[0] == "hybridnorm_image_encoder"
    assert config_to_json(hn.EncoderConfig(**TEXT), "hybridnorm")[0] == "hybridnorm_text_encoder"
    assert config_to_json(hn.EncoderConfig(**TEXT))[0] == "hybridnorm_text_encoder"
    with pytest.raises(hn.UserError, match="architecture=gpt2 is not of models with an EncoderConfig"):
        config_to_json(hn.EncoderConfig(**TEXT), "gpt2")
    with pytest.raises(hn.UserError, match=r"hybridnorm_text_encoder cannot express model\.input=pixels"):
        config_to_json(hn.EncoderConfig(**IMAGES), "hybridnorm_text_encoder")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pooling": "sum"}, "pooling='sum' is not implemented; implemented: class, mean"),
        ({"pooling": "end"}, "pooling=end: only for model.input=tokens"),
        ({"positions": "alibi"}, "positions='alibi' is not implemented; implemented: learned, rope"),
        ({"pooling_norm": "crmsnorm"}, "pooling_norm='crmsnorm' is not implemented"),
        ({"image_size": [1, 2, 3]}, r"image_size=\[1, 2, 3\] must be \[height, width\]"),
        ({"max_position_embeddings": 4}, "max_positions=4: must be 5"),
        ({"logits_cap": 3.0}, "logits_cap=3.0 is not known for hybridnorm_image_encoder"),
        ({"num_labels": 2, "id2label": {"0": "a"}}, "num_labels=2, but id2label has 1"),
        ({"distillation_head": True}, "distillation_head=true: needs model.distillation_token"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not implemented"),
    ],
)
def test_nonsense_is_refused_in_one_line(keys, message):
    _, document = config_to_json(hn.EncoderConfig(**IMAGES, num_classes=3), "hybridnorm")
    with pytest.raises(hn.UserError, match=message) as raised:
        config_from_json(document | keys, "config.json")
    assert "\n" not in str(raised.value)
