"""Our PyTorch code computes what our Encoder computes: every kind, the checkpoints of others, both converted forms."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from covering import diagonal, others_are_long
from exported_encoders import (
    KINDS,
    as_leaves,
    config_of,
    export,
    in_their_layout,
    in_torch,
    inputs_of,
    losses,
    named,
)
from exported_models import torch, transformers
from flax.traverse_util import flatten_dict
from test_architectures import GOLDENS, VISION, golden_of

import hybridnorm_jax as hn
from hybridnorm_jax import equivalence
from hybridnorm_jax.interop.architectures import mathematics

# Each kind of encoder is compared once by `make test`: these with gradients, the others in float64.
IN_FLOAT32 = (
    *("hybrid", "two_heads", "attention_pooling_with_layernorm", "padded_within", "causal_images", "experts"),
    *("text_at_its_end", "text_with_class_token"),
)
IN_FLOAT64 = [name for name in KINDS if name not in IN_FLOAT32]
FORMS = {
    "as_it_is": lambda config, params: (config, params),
    "pre_rmsnorm": equivalence.to_pre_rmsnorm,
    "pre_crmsnorm": equivalence.to_pre_crmsnorm,
    "pre_crmsnorm_padded": lambda config, params: equivalence.to_pre_crmsnorm(config, params, pad_to=8),
}


def pixels_or_tokens(golden):
    return golden["tokens"] if "tokens" in golden else np.moveaxis(golden["pixel_values"], 1, 3)


def gradients_of_ours(config, params, inputs):
    """(outputs by name, gradients by path) of the sum of their mean squares."""

    def loss(params):
        outputs = named(hn.build_model(config).apply({"params": params}, inputs))
        return losses(outputs), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    return outputs, flatten_dict(gradients, sep="/")


def assert_outputs_are_near(theirs, ours, largest):
    """By name; `largest` is of outputs of about 1."""
    assert {name for name in ("logits", "last_hidden_state", "pooler_output") if name in theirs} == set(ours)
    for name, array in ours.items():
        size = max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(theirs[name].detach().numpy(), array, rtol=0, atol=largest * size, err_msg=name)


def assert_same_in_float32(exported, inputs):
    """Outputs, and the gradient of every parameter, norm-wise."""
    config, params, _ = exported
    ours, gradients = gradients_of_ours(config, params, inputs)
    model = in_torch(exported)
    theirs = model(in_their_layout(inputs))
    # A float32 has 6e-8 of an output of 1: 2e-5 is what some hundred roundings leave.
    assert_outputs_are_near(theirs, ours, 2e-5)
    losses({name: theirs[name] for name in ours}).backward()
    found = as_leaves(config, {name: each.grad for name, each in model.named_parameters()})
    whole = np.linalg.norm([np.linalg.norm(gradient) for gradient in gradients.values()])
    assert whole > 0
    for path, gradient in gradients.items():
        assert np.isfinite(found[path]).all(), path
        # Of a bias of keys the softmax sees nothing: its gradient is a rounding error of the others.
        allowed = 1e-4 * np.linalg.norm(gradient) + 1e-6 * whole
        assert np.linalg.norm(found[path] - gradient) <= allowed, path


def assert_same_in_float64(exported, inputs):
    config, params, _ = exported
    ours = named(jax.jit(hn.build_model(config).apply)({"params": params}, inputs))
    model = in_torch(exported)
    assert model.dtype == torch.float64
    with torch.no_grad():
        assert_outputs_are_near(model(in_their_layout(inputs)), ours, 1e-12)


@pytest.mark.parametrize("name", others_are_long(KINDS, IN_FLOAT32))
def test_every_kind_is_equal_in_float32(tmp_path, name):
    exported = export(tmp_path / "model", config_of(name))
    assert_same_in_float32(exported, inputs_of(exported.config))


@pytest.mark.parametrize("name", others_are_long(KINDS, IN_FLOAT64))
def test_every_kind_is_equal_in_float64(tmp_path, name):
    """No approximation hides behind the rounding of float32."""
    with jax.enable_x64(True):
        exported = export(tmp_path / "model", config_of(name, dtype="float64", param_dtype="float64"))
        assert_same_in_float64(exported, inputs_of(exported.config))


@pytest.mark.parametrize(("name", "form"), diagonal(sorted(VISION), FORMS, apart=4))
def test_a_checkpoint_is_equal_in_float32(tmp_path, name, form):
    config, params = FORMS[form](*hn.load_huggingface(GOLDENS / name))
    golden = golden_of(name)
    exported = export(tmp_path / "model", config, params)
    assert_same_in_float32(exported, pixels_or_tokens(golden))
    with torch.no_grad():
        theirs = in_torch(exported)(in_their_layout(pixels_or_tokens(golden)))
    # What transformers' own class has computed; in a converted form the stream of CLIP's tower has no mean any more.
    kept = {name: array for name, array in golden.items() if name in theirs and name != "last_hidden_state"}
    assert kept
    for name, array in kept.items():
        size = max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(theirs[name].numpy(), array, rtol=0, atol=2e-5 * size, err_msg=name)


@pytest.mark.parametrize(("form", "name"), diagonal(FORMS, sorted(VISION)[::-1], apart=4))
def test_a_checkpoint_is_equal_in_float64(tmp_path, name, form):
    with jax.enable_x64(True):
        config, params = hn.load_huggingface(GOLDENS / name, dtype="float64")
        config, params = FORMS[form](dataclasses.replace(config, dtype="float64"), params)
        inputs = pixels_or_tokens(golden_of(name))
        inputs = inputs if inputs.ndim == 2 else inputs.astype(np.float64)
        assert_same_in_float64(export(tmp_path / "model", config, params), inputs)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, name):
    exported = export(tmp_path / "model", config_of(name))
    config, params, directory = exported
    # And what transformers saves again, which leaves out of config.json what is as it is by default.
    in_torch(exported).save_pretrained(tmp_path / "again")
    for each in (directory, tmp_path / "again"):
        back, read = hn.load_huggingface(each)
        assert isinstance(back, hn.EncoderConfig)
        assert mathematics(back) == mathematics(config)
        assert (back.dropout, back.init_std) == (config.dropout, config.init_std)
        jax.tree.map(np.testing.assert_array_equal, read, params)


def test_masked_patches_are_the_mask_token(tmp_path):
    exported = export(tmp_path / "model", config_of("masked"))
    config, params, _ = exported
    pixels = inputs_of(config)
    masked = np.random.default_rng(0).integers(0, 2, (3, config.num_patches)).astype(bool)
    ours = named(jax.jit(hn.build_model(config).apply)({"params": params}, pixels, masked=masked))
    model = in_torch(exported)
    with torch.no_grad():
        theirs = model(in_their_layout(pixels), bool_masked_pos=torch.tensor(masked))
        plain = model(in_their_layout(pixels))
    assert_outputs_are_near(theirs, ours, 2e-5)
    assert float((theirs.last_hidden_state - plain.last_hidden_state).abs().max()) > 0.01


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("text")])
def test_padding_behind_a_text_changes_nothing(tmp_path, name):
    exported = export(tmp_path / "model", config_of(name))
    model, tokens = in_torch(exported), in_their_layout(inputs_of(exported.config))[:2]
    mask = torch.ones_like(tokens)
    tokens[1, 7:], mask[1, 7:] = 1, 0
    with torch.no_grad():
        padded, alone = model(tokens, attention_mask=mask), model(tokens[1:, :7])
    pooled = "logits" if "logits" in padded else "pooler_output"
    torch.testing.assert_close(padded[pooled][1:], alone[pooled], rtol=0, atol=2e-6)


def test_the_loss_is_that_of_the_labels_and_a_head_may_be_drawn_or_left_out(tmp_path):
    exported = export(tmp_path / "model", config_of("hybrid"))
    model, pixels = in_torch(exported), in_their_layout(inputs_of(exported.config))
    labels = torch.tensor([0, 4, 2])
    outputs = model(pixels, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    load = {"pretrained_model_name_or_path": exported.directory, "trust_remote_code": True}
    body = transformers.AutoModel.from_pretrained(**load)
    torch.testing.assert_close(model.classifier(body(pixels).pooler_output), outputs.logits)
    other = transformers.AutoModelForImageClassification.from_pretrained(
        **load, num_labels=9, ignore_mismatched_sizes=True
    )
    assert other(pixels).logits.shape == (3, 9)


@pytest.mark.parametrize(
    "name",
    others_are_long(
        ["hybrid", "attention_pooling", "padded_within", "rotated", "causal_images"], ["padded_within", "rotated"]
    ),
)
def test_the_forward_pass_is_one_graph_and_may_be_checkpointed(tmp_path, fresh_compiler, name):
    exported = export(tmp_path / "model", config_of(name))
    model, pixels = in_torch(exported), in_their_layout(inputs_of(exported.config))
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for found, expected in zip(graph(pixels).values(), model(pixels).values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = []
    for checkpointing in (False, True):
        model = in_torch(exported).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses(dict(model(pixels))).backward()
        gradients.append([each.grad for each in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_streams_and_tuples_are_given_where_they_are_asked_for(tmp_path):
    exported = export(tmp_path / "model", config_of("peri"))
    model, pixels = in_torch(exported), in_their_layout(inputs_of(exported.config))
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == exported.config.num_layers + 1
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    hidden, pooled = model(pixels, return_dict=False)
    torch.testing.assert_close(pooled, outputs.pooler_output)
    torch.testing.assert_close(hidden, outputs.last_hidden_state)


def test_fresh_weights_are_drawn(tmp_path):
    directory = export(tmp_path / "model", config_of("two_heads")).directory
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    std = config.initializer_range
    for drawn in (model.model.register_tokens.weight, model.model.embed_patches.weight, model.classifier.weight):
        assert 0.5 * std < float(drawn.detach().std()) < 2 * std
    assert float(model.model.embed_patches.bias.detach().abs().max()) == 0


FRESH = """
import sys
import numpy as np, torch, transformers
sys.modules["hybridnorm_jax"] = sys.modules["jax"] = None  # neither may be needed
directory, auto, inputs, out = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True)
with torch.no_grad():
    outputs = model(torch.tensor(np.load(inputs)))
np.savez(out, **{name: array.numpy() for name, array in outputs.items()})
"""


@pytest.mark.parametrize(
    ("name", "auto"), [("hf_vit", "AutoModelForImageClassification"), ("hf_clip_text", "AutoModel")]
)
def test_a_fresh_process_of_transformers_alone_loads_it(tmp_path, monkeypatch, name, auto):
    config, params = equivalence.to_pre_crmsnorm(*hn.load_huggingface(GOLDENS / name))
    exported, inputs = export(tmp_path / "model", config, params), pixels_or_tokens(golden_of(name))
    np.save(tmp_path / "inputs.npy", in_their_layout(inputs).numpy())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [exported.directory, auto, tmp_path / "inputs.npy", tmp_path / "outputs.npz"]
    subprocess.run([sys.executable, "-c", FRESH, *map(str, arguments)], check=True, cwd=tmp_path)
    with np.load(tmp_path / "outputs.npz") as theirs:
        for name, array in named(jax.jit(hn.build_model(config).apply)({"params": params}, inputs)).items():
            np.testing.assert_allclose(theirs[name], array, rtol=0, atol=2e-5 * max(1.0, float(np.abs(array).max())))


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("hybrid", {"pooling": "sum"}, "pooling='sum': must be one of class"),
        ("hybrid", {"pooling": "end"}, "pooling='end': only of tokens"),
        ("hybrid", {"class_token": False}, "pooling=class: needs class_token"),
        ("hybrid", {"positions": "alibi"}, "positions='alibi': must be one of learned, rope"),
        ("hybrid", {"distillation_head": True}, "distillation_head=True: needs distillation_token"),
        ("hybrid", {"whole_outside": True}, "whole_outside=True: needs norm=crmsnorm"),
        ("hybrid", {"max_position_embeddings": 3}, "max_position_embeddings=3: must be 13"),
        ("hybrid", {"image_size": 2}, "patch_size=.*: larger than image_size=2"),
        ("hybrid", {"placements": [{}]}, "placements: 1 of them for 3 layers"),
        ("peri", {"norm_pooled_only": True, "pooling": "none"}, "norm_pooled_only=True: not with pooling=none"),
        ("attention_pooling", {"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads=3: with pool"),
        (
            "compressed",
            {"pooling": "attention", "num_attention_heads": 1, "num_key_value_heads": 1},
            "pooling_norm=None: with pooling=attention must be rmsnorm or layernorm",
        ),
        ("rotated", {"position_scope": "patches"}, "position_scope='patches': positions=rope turns all tokens"),
    ],
)
def test_nonsense_is_refused_by_name(tmp_path, name, keys, message):
    exported = export(tmp_path / "model", config_of(name))
    with pytest.raises(ValueError, match=message):
        in_torch(exported, **keys)


def test_inputs_that_do_not_fit_are_refused_by_name(tmp_path):
    model = in_torch(export(tmp_path / "images", config_of("peri")))
    with pytest.raises(ValueError, match=r"pixel_values: shape \(1, 3, 9, 9\) must be \(batch, 2, 13, 8\)"):
        model(torch.zeros(1, 3, 9, 9))
    with pytest.raises(ValueError, match="bool_masked_pos: the model has no mask token"):
        model(torch.zeros(1, 2, 13, 8), bool_masked_pos=torch.zeros(1, 12))
    model = in_torch(export(tmp_path / "text", config_of("text")))
    with pytest.raises(ValueError, match="21 positions, but max_position_embeddings=20"):
        model(torch.zeros(1, 21, dtype=torch.long))
