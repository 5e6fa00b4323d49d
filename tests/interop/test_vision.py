"""Encoders of transformers: tiny checkpoints, random models of its classes, and every key changed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import diagonal
from safetensors.numpy import load_file, save_file
from test_architectures import GOLDENS, VISION, document_of, golden_of, tolerance

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import config_from_json, mathematics


def inputs_of(golden):
    """Pixels with the channels last, or tokens."""
    return golden["tokens"] if "tokens" in golden else np.moveaxis(golden["pixel_values"], 1, 3)


def outputs_of(output):
    """By transformers' names."""
    if not isinstance(output, hn.EncoderOutput):
        return {"logits": output}
    found = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooled}
    return {name: array for name, array in found.items() if array is not None}


def assert_same(found, expected):
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance(expected[name]), err_msg=name)


@pytest.mark.parametrize("name", sorted(VISION))
def test_outputs_are_those_of_transformers_and_gradients_are_finite(name):
    config, params = hn.load_huggingface(GOLDENS / name)
    golden = golden_of(name)
    model = hn.build_model(config)
    assert isinstance(model, hn.Encoder)

    def mean_square(params):
        outputs = outputs_of(model.apply({"params": params}, inputs_of(golden)))
        return sum(jnp.square(array).mean() for array in outputs.values()), outputs

    gradients, outputs = jax.jit(jax.grad(mean_square, has_aux=True))(params)
    assert set(outputs) == set(golden) - {"tokens", "pixel_values"}
    assert_same(outputs, golden)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.asarray(gradient).any() or "mask_token" in str(path), path


@pytest.mark.parametrize("name", sorted(VISION))
def test_what_is_written_back_is_what_was_read(tmp_path, name):
    config, params = hn.load_huggingface(GOLDENS / name)
    hn.save_huggingface(tmp_path / "out", config, params)
    theirs, ours = (load_file(directory / "model.safetensors") for directory in (GOLDENS / name, tmp_path / "out"))
    assert {key: (array.shape, array.tobytes()) for key, array in ours.items()} == {
        key: (array.shape, array.tobytes()) for key, array in theirs.items()
    }
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("model_type", "architectures"):
        assert written[key] == document_of(name)[key]
    again, back = hn.load_huggingface(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("hf_clip_text", "text_model."),
        ("hf_clip_vision", "vision_model."),
        ("hf_siglip_vision", "vision_model."),
    ],
)
def test_names_of_earlier_versions_are_read(tmp_path, name, prefix):
    """The names of towers had a prefix once."""
    tensors = load_file(GOLDENS / name / "model.safetensors")
    save_file({f"{prefix}{key}": array for key, array in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(document_of(name)))
    config, params = hn.load_huggingface(tmp_path)
    expected, wanted = hn.load_huggingface(GOLDENS / name)
    assert config == expected
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


# ---- Against transformers itself.

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20, "image_size": 12}
VIT |= {"patch_size": 4, "layer_norm_eps": 1e-3}
TEXT = {key: VIT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
TEXT |= {"vocab_size": 30, "max_position_embeddings": 9, "eos_token_id": 7}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 3}
# Class -> its own model_type, its keys, and changes of them, each of which must be exact or refused.
MODELS = {
    "ViTForImageClassification": ("vit", VIT),
    "DeiTForImageClassification": ("deit", VIT),
    "DeiTForImageClassificationWithTeacher": ("deit", VIT),
    "Dinov2ForImageClassification": ("dinov2", DINO),
    "SiglipVisionModel": ("siglip_vision_model", VIT),
    "CLIPVisionModel": ("clip_vision_model", VIT),
    "CLIPTextModel": ("clip_text_model", TEXT),
}
CHANGES = [
    {},
    {"image_size": [16, 8]},
    {"image_size": 15},
    {"patch_size": [2, 3]},
    {"num_channels": 1},
    {"qkv_bias": False},
    {"head_dim": 6},
    {"num_attention_heads": 5},
    {"num_labels": 2},
    {"num_labels": 5},
    {"id2label": {"0": "cat", "1": "dog", "2": "cow"}},
    {"hidden_act": "relu"},
    {"hidden_act": "quick_gelu"},
    {"hidden_act": "tanh"},
    {"layer_norm_eps": 0.1},
    {"use_swiglu_ffn": True},
    {"mlp_ratio": 2},
    {"use_mask_token": False},
    {"vision_use_head": False},
    {"eos_token_id": 2},
    {"eos_token_id": 29},
    {"eos_token_id": 1000},
    {"eos_token_id": [7, 8]},
    {"pooler_act": "relu", "pooler_output_size": 5},
    {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
    {"layerscale_value": 3.0},
    {"projection_dim": 3},
    {"is_causal": True},
    {"tie_word_embeddings": True},
]

ALWAYS_READ = ({}, {"num_labels": 5}, {"layer_norm_eps": 0.1}, {"hidden_act": "relu"})


def random_model(class_name, keys, directory):
    """A model of transformers with every parameter random, in the directory; (the model, its inputs)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cls = getattr(transformers, class_name)
    random = torch.Generator().manual_seed(0)
    config = cls.config_class(**keys, attn_implementation="eager")
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(directory)
    if class_name == "CLIPTextModel":
        tokens = torch.randint(0, 30, (3, 9), generator=random)
        tokens[0, 3] = tokens[0, 6] = 7
        return model, {"input_ids": tokens}
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return model, {"pixel_values": torch.randn((2, config.num_channels, height, width), generator=random)}


@pytest.mark.parametrize(("class_name", "change"), diagonal(list(MODELS), CHANGES, apart=3))
def test_every_key_is_exact_or_refused(tmp_path, class_name, change):
    """A key that changes numbers is read, or refused in one line; one that changes none may be either."""
    torch = pytest.importorskip("torch")
    _, keys = MODELS[class_name]
    try:
        model, inputs = random_model(class_name, keys | change, tmp_path / "theirs")
        with torch.no_grad():
            expected = model(**inputs)
    except Exception as error:  # a model that there is not
        pytest.skip(f"transformers refuses it: {type(error).__name__}")
    refusal = None
    try:
        config, params = hn.load_huggingface(tmp_path / "theirs")
    except hn.UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal
        assert change not in ALWAYS_READ, refusal
        return
    ours = inputs.get("input_ids")
    ours = np.moveaxis(inputs["pixel_values"].numpy(), 1, 3) if ours is None else ours.numpy()
    outputs = outputs_of(jax.jit(hn.build_model(config).apply)({"params": params}, ours))
    assert set(outputs) == {name for name in ("logits", "last_hidden_state", "pooler_output") if name in expected}
    assert_same(outputs, {name: expected[name].numpy() for name in outputs})
    hn.save_huggingface(tmp_path / "ours", config, params)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    with torch.no_grad():
        back = again.eval()(**inputs)
    for name in outputs:
        wanted = expected[name].numpy()
        np.testing.assert_allclose(back[name].numpy(), wanted, rtol=0, atol=tolerance(wanted) / 10)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hf_dinov2", {"image_size": [16, 8]}, r"image_size=\[16, 8\] must be square"),
        ("hf_clip_vision", {"image_size": [16, 16]}, r"image_size=\[16, 16\] must be one number"),
        ("hf_vit", {"image_size": [1, 2, 3]}, r"image_size=\[1, 2, 3\] must be \[height, width\]"),
        ("hf_vit", {"num_labels": 3}, r"num_labels=3, but id2label has 7"),
        ("hf_vit", {"id2label": [1]}, r"id2label=\[1\] must be a map"),
        ("hf_vit", {"patch_size": 0}, r"patch_size=0: must be at least 1"),
        ("hf_vit", {"is_causal": True}, r"is_causal=True is not implemented"),
        ("hf_clip_text", {"eos_token_id": None}, r"eos_token_id=null, but a value is needed"),
        ("hf_siglip_vision", {"qkv_bias": False}, r"qkv_bias=False is not known"),
    ],
)
def test_bad_keys_are_refused(name, change, message):
    with pytest.raises(hn.UserError, match=message):
        config_from_json(document_of(name) | change, "config.json")


def test_an_encoder_is_no_decoder():
    config, params = hn.load_huggingface(GOLDENS / "hf_vit")
    with pytest.raises(hn.UserError, match="architecture=gpt2 is not of models with an EncoderConfig"):
        hn.save_huggingface("/nowhere/at/all", config, params, architecture="gpt2")
    assert mathematics(config)["pooling"] == "class"
