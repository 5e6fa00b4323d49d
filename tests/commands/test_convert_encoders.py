"""`hybridnorm convert` on encoders, and what the other commands say of one."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.commands import convert, main
from hybridnorm_jax.interop.own_encoder import ENCODER_CODE_FILES

GOLDENS = Path(__file__).parents[1] / "goldens" / "architectures"
# Checkpoint -> what its golden calls what is compared, and how many means are still subtracted.
CASES = {
    "hf_vit": ("logits", 0),
    "hf_vit_no_qkv_bias": ("logits", 0),
    "hf_deit": ("logits", 0),
    "hf_dinov2": ("logits", 0),
    "hf_siglip_vision": ("pooler_output", 1),
    "hf_clip_vision": ("pooler_output", 1),
    "hf_clip_text": ("pooler_output", 0),
}

COMPARED = {
    "hf_siglip_vision": "last hidden state and what is pooled",
    "hf_clip_vision": "what is pooled",
    "hf_clip_text": "last hidden state and what is pooled",
}


# Two parts compared, and a mean that stays. tests/equivalence converts encoders with all that they may have.
@pytest.mark.parametrize("name", others_are_long(CASES, ["hf_siglip_vision"]))
def test_the_converted_model_is_proved_saved_and_read(name, tmp_path, capsys):
    output, centrings = CASES[name]
    convert.run([str(GOLDENS / name), str(tmp_path / "out"), "--form", "pre_crmsnorm"])
    printed = capsys.readouterr().out
    assert "float64" in printed
    assert (f"still subtracted: {centrings}\n" in printed) == (centrings > 0)
    assert ("changed: layer scale is part of" in printed) == (name == "hf_dinov2")
    assert f"\n{COMPARED.get(name, 'logits')}, converted - original" in printed
    config, params = hn.load_run(str(tmp_path / "out"))
    assert isinstance(config.model, hn.EncoderConfig)
    assert config.model.norm == "crmsnorm"
    with np.load(GOLDENS / name / "golden.npz") as golden:
        inputs = golden["tokens"] if "tokens" in golden else np.moveaxis(golden["pixel_values"], 1, 3)
        expected = golden[output]
    found = jax.jit(hn.build_model(config.model).apply)({"params": params}, inputs)
    found = found if output == "logits" else found.pooled
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, float(np.abs(expected).max()) / 3))


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("hf_vit", "AutoModelForImageClassification"),
        ("hf_clip_vision", "AutoModel"),
        ("hf_clip_text", "AutoModel"),
    ],
)
def test_what_was_converted_is_exported_for_pytorch(name, auto, tmp_path, capsys):
    """The card's own example gives what the checkpoint's class of transformers gave."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers", minversion="5.0")
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    convert.run([str(GOLDENS / name), run, "--form", "pre_crmsnorm"])
    assert f"export {run} EXPORT_DIR" in capsys.readouterr().out
    assert main.main(["export", run, out]) == 0
    assert f"{auto}.from_pretrained({out!r}, trust_remote_code=True)" in capsys.readouterr().out
    written = {path.name for path in Path(out).iterdir()}
    assert written == {"README.md", "config.json", "model.safetensors", *ENCODER_CODE_FILES}
    with np.load(GOLDENS / name / "golden.npz") as golden:
        (inputs,) = (golden[each] for each in ("tokens", "pixel_values") if each in golden)
        expected = golden[CASES[name][0]]
    given = torch.tensor(inputs).long() if inputs.ndim == 2 else torch.tensor(inputs)
    example = re.search("```python\n(.*?)```", (Path(out) / "README.md").read_text(), re.DOTALL)[1]
    names = {"DIRECTORY": out, "pixels": given, "tokens": given}
    with torch.no_grad():
        exec(example, names)
    assert isinstance(names["model"], transformers.PreTrainedModel)
    found = names["logits"] if "logits" in names else names["outputs"].pooler_output
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


def test_plain_safetensors_of_an_encoder_are_our_tree(tmp_path, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    convert.run([str(GOLDENS / "hf_siglip_vision"), run, "--form", "pre_rmsnorm"])
    assert main.main(["export", run, str(out), "--format", "safetensors"]) == 0
    example = re.search("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    config, params = hn.load_run(run)
    names = {"DIRECTORY": str(out), "inputs": np.ones((1, *config.model.image_size, 3), np.float32)}
    exec(example, names)
    assert names["config"] == config.model
    jax.tree.map(np.testing.assert_array_equal, names["params"], params)
    assert names["outputs"].pooled.shape == (1, config.model.d_model)


def test_a_text_for_an_encoder_is_not_passed_over(tmp_path):
    (tmp_path / "text.txt").write_text("alpha " * 500)
    options = [str(GOLDENS / "hf_vit"), str(tmp_path / "out"), "--form", "pre_rmsnorm"]
    with pytest.raises(hn.UserError, match=r"text\.txt: .*hf_vit is an encoder, which is compared on random input"):
        convert.run([*options, "--text", str(tmp_path / "text.txt")])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The directory of a converted encoder."""
    out = tmp_path_factory.mktemp("encoder") / "out"
    convert.run([str(GOLDENS / "hf_vit"), str(out), "--form", "pre_rmsnorm"])
    return out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "RUN"], "an encoder, which no run trains"),
        (["train", "init_from=RUN", "run.dir=DIR"], "its parameters belong to another model"),
        (["export", "RUN", "DIR/exported", "--tokenizer", "t.json"], "is an encoder, which no run trains on text"),
        (["generate", "RUN", "--prompt", "hello"], "an encoder, which does not generate text"),
    ],
)
def test_other_commands_refuse_it_in_one_line(arguments, message, encoder, tmp_path, capsys):
    given = [each.replace("RUN", str(encoder)).replace("DIR", str(tmp_path)) for each in arguments]
    assert main.main(given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
