"""Every architecture of transformers that is read: 61 tiny checkpoints, whose logits transformers computed.

What tests/goldens/architectures holds is described in tests/goldens/README.md.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long
from safetensors.numpy import load_file

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import ARCHITECTURES, config_from_json, mathematics

GOLDENS = Path(__file__).parents[1] / "goldens" / "architectures"
NAMES = sorted(directory.name for directory in GOLDENS.iterdir())
# Checkpoints that are refused -> what the line says.
NOT_YET = {
    "hf_falcon_rw": "attn_implementation=None with alibi=True: transformers adds ALiBi once",
}
# Encoders: test_vision.py has them.
VISION = {
    "hf_clip_text",
    "hf_clip_vision",
    "hf_deit",
    "hf_dinov2",
    "hf_siglip_vision",
    "hf_vit",
    "hf_vit_no_qkv_bias",
}
READ = [name for name in NAMES if name not in NOT_YET and name not in VISION]


def tolerance(logits):
    """Float32's, of logits of this size: a fresh process of transformers reproduces them to a fifth of it."""
    return 1e-5 * max(1.0, float(np.abs(logits).max()) / 3)


def document_of(name):
    return json.loads((GOLDENS / name / "config.json").read_text())


def golden_of(name):
    with np.load(GOLDENS / name / "golden.npz") as arrays:
        return dict(arrays)


def test_there_are_61():
    assert len(NAMES) == 61


def test_every_architecture_has_a_checkpoint():
    """There, or among those in the folder above."""
    files = [*GOLDENS.glob("*/config.json"), *GOLDENS.parent.glob("hf_*/config.json")]
    assert {json.loads(file.read_text())["model_type"] for file in files} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", NOT_YET)
def test_what_is_not_read_is_refused_in_one_line(name):
    with pytest.raises(hn.UserError, match=re.escape(NOT_YET[name])) as raised:
        hn.load_huggingface(GOLDENS / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", READ)
def test_logits_are_those_of_transformers(name):
    config, params = hn.load_huggingface(GOLDENS / name)
    golden = golden_of(name)
    logits = jax.jit(hn.Decoder(config).apply)({"params": params}, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=tolerance(golden["logits"]))


# A gradient takes three times as long to compile as the logits.
@pytest.mark.parametrize("name", others_are_long(READ, READ[::5]))
def test_gradients_are_finite_and_those_of_the_logits_of_transformers(name):
    config, params = hn.load_huggingface(GOLDENS / name)
    golden = golden_of(name)
    model = hn.Decoder(config)

    def mean_square(params):
        logits = model.apply({"params": params}, golden["tokens"])
        return jnp.mean(jnp.square(logits)), logits

    gradients, logits = jax.jit(jax.grad(mean_square, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=tolerance(golden["logits"]))
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.asarray(gradient).any(), path


@pytest.mark.parametrize(("how", "is_golden"), [("eager", True), ("sdpa", False)])
def test_a_falcon_with_alibi_says_how_often_it_is_added(tmp_path, how, is_golden):
    """transformers adds it twice with eager, which the golden was computed with, and once with sdpa."""
    directory = tmp_path / "falcon"
    shutil.copytree(GOLDENS / "hf_falcon_rw", directory)
    document = document_of("hf_falcon_rw") | {"attn_implementation": how}
    (directory / "config.json").write_text(json.dumps(document))
    config, params = hn.load_huggingface(directory)
    golden = golden_of("hf_falcon_rw")
    logits = jax.jit(hn.Decoder(config).apply)({"params": params}, golden["tokens"])
    distance = np.abs(logits - golden["logits"]).max()
    assert distance < tolerance(golden["logits"]) if is_golden else distance > 0.1
    hn.save_huggingface(tmp_path / "out", config, params, architecture="falcon")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attn_implementation"] == how
    assert hn.load_huggingface(tmp_path / "out")[0] == config


@pytest.mark.parametrize("name", READ)
def test_what_is_written_back_is_what_was_read(tmp_path, name):
    """Tensor by tensor the same bits under the same names, and a config.json of the same meaning."""
    config, params = hn.load_huggingface(GOLDENS / name)
    hn.save_huggingface(tmp_path / "out", config, params, architecture=document_of(name)["model_type"])
    theirs, ours = (load_file(directory / "model.safetensors") for directory in (GOLDENS / name, tmp_path / "out"))
    assert {key: array.tobytes() for key, array in ours.items()} == {
        key: array.tobytes() for key, array in theirs.items()
    }
    assert {key: array.shape for key, array in ours.items()} == {key: array.shape for key, array in theirs.items()}
    again, back = hn.load_huggingface(tmp_path / "out")
    assert mathematics(again) == mathematics(config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", READ)
def test_transformers_computes_the_same_with_what_is_written_back(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config, params = hn.load_huggingface(GOLDENS / name)
    hn.save_huggingface(tmp_path / "out", config, params, architecture=document_of(name)["model_type"])
    tokens = torch.from_numpy(golden_of(name)["tokens"]).long()
    logits = []
    for directory in (GOLDENS / name, tmp_path / "out"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model.eval()(tokens, use_cache=False).logits.numpy())
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=tolerance(logits[0]) / 10)


@pytest.mark.parametrize("name", READ)
def test_every_key_is_read_by_its_own_architecture_alone(name):
    """A rope key of another architecture, at the top of the file, changes nothing silently."""
    document = document_of(name)
    architecture = ARCHITECTURES[document["model_type"]]
    for key in (
        "rotary_emb_base",
        "rotary_pct",
        "rope_theta",
        "partial_rotary_factor",
        "rotary_dim",
        "rope_parameters",
    ):
        if key in document or key in architecture._own_names:
            continue
        with pytest.raises(hn.UserError, match=f"{key}="):
            config_from_json(document | {key: 0.5}, "config.json")
