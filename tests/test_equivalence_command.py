"""python -m hybridnorm_jax.equivalence, on Hugging Face directories and on a run's."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax import command_line
from hybridnorm_jax.equivalence import __main__ as command
from hybridnorm_jax.equivalence import decoder_forms
from hybridnorm_jax.equivalence.directories import read_directory
from hybridnorm_jax.equivalence.proof import LARGEST_RELATIVE

GOLDENS = Path(__file__).parent / "goldens"
PRE_LN_RUN = [
    *("model.scheme=pre", "model.norm=layernorm", "model.norm_bias=true", "model.d_model=16", "model.num_layers=1"),
    *("model.num_heads=2", "model.mlp_dim=16", "model.activation=gelu"),
    *("train.steps=2", "train.batch_size=8", "train.seq_len=8", "train.sample_tokens=0", "data.validation_fraction=0"),
]


@pytest.fixture(autouse=True)
def _narrow_again():
    """The command switches float64 on for its whole process."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def trained(tmp_path):
    """The directory of a Pre-LN run of two steps."""
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 257, 400).astype(np.uint16))
    words = [f"run.dir={tmp_path}/runs", "run.name=pre_ln", "data.source=tokens", f"data.files=[{tokens}]"]
    assert command_line.run_train([*words, f"data.validation.all=[{tokens}]", *PRE_LN_RUN]) == 0
    return tmp_path / "runs" / "pre_ln"


def _rows(output):
    """arithmetic -> its numbers in the table of logits."""
    lines = output.partition("arithmetic")[2].splitlines()[1:4]
    return {line.split()[0]: [float(word) for word in line.split()[1:]] for line in lines}


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_gpt_neox", "hf_gpt_neox_old_config", "hf_opt"])
@pytest.mark.parametrize("form", ["pre_rmsnorm", "pre_crmsnorm"])
def test_a_hugging_face_directory(name, form, tmp_path, capsys):
    out = tmp_path / "deep" / "converted"
    words = [str(GOLDENS / name), str(out), "--form", form]
    assert command.main([*words, "--pad-to", "24"] if form == "pre_crmsnorm" else words) == 0
    rows = _rows(capsys.readouterr().out)
    assert rows["float64"][0] < 1e-13 < rows["float32"][0] < 1e-5 < rows["bfloat16"][0] < 0.2
    jax.config.update("jax_enable_x64", False)

    source = read_directory(str(out))
    assert source.config.model.d_model == (32 if form == "pre_rmsnorm" else 48)
    golden = np.load(GOLDENS / name / "golden.npz")
    logits = hn.Decoder(source.config.model).apply({"params": source.params}, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_a_run_and_its_conversion_score_the_same(trained, capsys, tmp_path):
    assert command.main([str(trained), str(tmp_path / "stored"), "--form", "pre_crmsnorm"]) == 0
    printed = capsys.readouterr().out
    assert "run, step 2" in printed
    assert "stream of 16 stored as 15" in printed
    assert "parameters: " in printed
    jax.config.update("jax_enable_x64", False)
    losses = []
    for directory in (trained, tmp_path / "stored"):
        assert command_line.run_eval([str(directory), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["sets"]["all"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # And a run can start from it.
    words = [f"run.dir={tmp_path}/runs", "run.name=further", f"init_from={tmp_path}/stored", "train.steps=1"]
    config = str(tmp_path / "stored" / "config.yaml")
    assert command_line.run_train([config, *words]) == 0


def test_float64_parameters(tmp_path, capsys):
    assert (
        command.main([str(GOLDENS / "hf_opt"), str(tmp_path / "o"), "--form", "pre_rmsnorm", "--dtype", "float64"]) == 0
    )
    source = read_directory(str(tmp_path / "o"))
    assert {leaf.dtype for leaf in jax.tree.leaves(source.params)} == {np.dtype("float64")}


def test_a_tokenizer_comes_along(tmp_path, capsys):
    import tokenizers

    directory = tmp_path / "hf"
    shutil.copytree(GOLDENS / "hf_gpt2", directory)
    words = {chr(33 + number): number for number in range(60)} | {"</s>": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert command.main([str(directory), str(tmp_path / "o"), "--form", "pre_rmsnorm"]) == 0
    assert "text (tokenizer.json)" in capsys.readouterr().out
    assert read_directory(str(tmp_path / "o")).config.data.tokenizer == str(tmp_path / "o" / "tokenizer.json")


def test_a_wrong_conversion_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoder_forms, "recenter", lambda params, layout: params)
    assert command.main([str(GOLDENS / "hf_gpt2"), str(tmp_path / "o"), "--form", "pre_rmsnorm"]) == 2
    captured = capsys.readouterr()
    assert f"more than {LARGEST_RELATIVE}; nothing written" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf_llama", "OUT", "--form", "pre_rmsnorm"], "model.norm=rmsnorm: only LayerNorm"),
        (["hf_olmo2", "OUT", "--form", "pre_crmsnorm"], "model.norm=rmsnorm"),
        (["hf_gpt2", "OUT", "--form", "pre_rmsnorm", "--pad-to", "8"], "--pad-to 8: only for --form pre_crmsnorm"),
        (["hf_gpt2", "OUT", "--form", "pre_crmsnorm", "--pad-to", "0"], "pad_to=0: must be at least 1"),
        (["hf_gpt2", ".", "--form", "pre_rmsnorm"], ".: exists already"),
        (["hf_nothing", "OUT", "--form", "pre_rmsnorm"], "hf_nothing"),
        (["hf_gpt2", "OUT", "--form", "pre_rmsnorm", "--text", "/nowhere"], "--text /nowhere: cannot be read"),
        ([".", "OUT", "--form", "pre_rmsnorm"], "no complete checkpoint there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_converted_ends_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(GOLDENS)
    words = [str(tmp_path / "o") if word == "OUT" else word for word in words]
    assert command.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []
