"""`hybridnorm convert` on encoders, and what the other commands say of one."""

from pathlib import Path

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.commands import convert, main

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


@pytest.mark.parametrize("name", CASES)
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
    ("arguments", "message"),
    [
        (["eval", "RUN"], "an encoder, which no run trains"),
        (["train", "init_from=RUN", "run.dir=DIR"], "its parameters belong to another model"),
        (["export", "RUN", "DIR/exported"], "an encoder; hn.save_huggingface writes one"),
        (["generate", "RUN", "--prompt", "hello"], "an encoder, which does not generate text"),
    ],
)
def test_other_commands_refuse_it_in_one_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    convert.run([str(GOLDENS / "hf_vit"), str(out), "--form", "pre_rmsnorm"])
    capsys.readouterr()
    given = [each.replace("RUN", str(out)).replace("DIR", str(tmp_path)) for each in arguments]
    assert main.main(given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
