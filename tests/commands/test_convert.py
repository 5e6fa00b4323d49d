"""hybridnorm convert, on Hugging Face directories and on a run's."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import diagonal

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.commands.program import in_float64
from hybridnorm_jax.commands.saved_model import read_directory
from hybridnorm_jax.config import plugins
from hybridnorm_jax.equivalence import decoder_forms, proof
from hybridnorm_jax.interop.mathematics import mathematics
from hybridnorm_jax.model.abstract_params import abstract_params

GOLDENS = Path(__file__).parents[1] / "goldens"
pytestmark = pytest.mark.usefixtures("shared_programs")
PRE_LN_RUN = [
    *("model.scheme=pre", "model.norm=layernorm", "model.norm_bias=true", "model.d_model=16", "model.num_layers=1"),
    *("model.num_heads=2", "model.mlp_dim=16", "model.activation=gelu"),
    *("train.steps=2", "train.batch_size=8", "train.seq_len=8", "train.sample_tokens=0", "data.validation_fraction=0"),
]


def _data(directory):
    """The arguments of `hybridnorm train` for random tokens in a file there, and for runs in its folder runs/."""
    tokens = directory / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 257, 400).astype(np.uint16))
    data = ["data.source=tokens", f"data.files=[{tokens}]", f"data.validation.train_all=[{tokens}]"]
    return [f"run.dir={directory}/runs", *data]


def _rows(output):
    """arithmetic -> its numbers in the table of logits."""
    lines = output.partition("arithmetic")[2].splitlines()[1:5]
    return {line[:12].strip(): [float(word) for word in line[12:].split()] for line in lines}


@pytest.mark.parametrize(
    ("name", "form"),
    # tests/interop reads every checkpoint; what is converted is a model, whatever its checkpoint was.
    diagonal(["hf_gpt2", "hf_gpt_neox", "hf_gpt_neox_old_config", "hf_opt"], ["pre_rmsnorm", "pre_crmsnorm"], apart=4),
)
def test_a_hugging_face_directory(name, form, tmp_path, capsys):
    out = tmp_path / "deep" / "converted"
    words = [str(GOLDENS / name), str(out), "--form", form]
    assert main(["convert", *words, *(["--pad-to", "24"] if form == "pre_crmsnorm" else [])]) == 0
    rows = _rows(capsys.readouterr().out)
    assert rows["float64"][0] < 1e-13 < rows["float32"][0] < 1e-5 < rows["bfloat16"][0] < 0.2
    assert rows["float64"][0] < 1e-9 < rows["as written"][0] < 1e-5

    source = read_directory(str(out))
    assert source.config.model.d_model == (32 if form == "pre_rmsnorm" else 48)
    golden = np.load(GOLDENS / name / "golden.npz")
    logits = jax.jit(hn.Decoder(source.config.model).apply)({"params": source.params}, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_a_run_and_its_conversion_score_the_same(capsys, tmp_path):
    assert main(["train", "run.name=pre_ln", *_data(tmp_path), *PRE_LN_RUN]) == 0
    trained = tmp_path / "runs" / "pre_ln"
    assert main(["convert", str(trained), str(tmp_path / "stored"), "--form", "pre_crmsnorm"]) == 0
    printed = capsys.readouterr().out
    assert "run, step 2" in printed
    assert "stream of 16 stored as 15" in printed
    assert "parameters: " in printed
    losses = []
    for directory in (trained, tmp_path / "stored"):
        assert main(["eval", str(directory), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["sets"]["train_all"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # And a run can start from it.
    words = [f"run.dir={tmp_path}/runs", "run.name=further", f"init_from={tmp_path}/stored", "train.steps=1"]
    config = str(tmp_path / "stored" / "config.yaml")
    assert main(["train", config, *words]) == 0
    # The converted directory itself has no optimizer state to go on with.
    capsys.readouterr()
    assert main(["train", config]) == 2
    assert "start a new run from it: init_from=" in capsys.readouterr().err


def test_a_run_that_was_trained_in_the_other_form_is_converted(capsys, tmp_path):
    form = "train.equivalent_form=pre_rmsnorm"
    assert main(["train", "run.name=pre_ln", form, *_data(tmp_path), *PRE_LN_RUN]) == 0
    assert main(["convert", str(tmp_path / "runs" / "pre_ln"), str(tmp_path / "stored"), "--form", "pre_rmsnorm"]) == 0
    config = read_directory(str(tmp_path / "stored")).config
    assert (config.model.norm, config.train.equivalent_form) == ("rmsnorm", "none")


def test_a_run_with_a_plugin_is_converted_where_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plugins, "_imported", {})
    plugin = tmp_path / "mine.py"
    plugin.write_text("x = 1\n")
    named = f"run.plugins=[{plugin}]"
    assert main(["train", "run.name=with_plugin", *_data(tmp_path), *PRE_LN_RUN, named]) == 0
    assert f"eval {tmp_path}/runs/with_plugin '{named}'\n" in capsys.readouterr().out
    convert = ["convert", f"{tmp_path}/runs/with_plugin", f"{tmp_path}/stored", "--form", "pre_rmsnorm"]
    monkeypatch.setattr(plugins, "_imported", {})
    assert main(convert) == 2
    assert f"name them yourself: {named}" in capsys.readouterr().err
    moved = plugin.rename(tmp_path / "moved.py")
    named = f"run.plugins=[{moved}]"
    assert main([*convert, named]) == 0
    command = shlex.split(capsys.readouterr().out.partition("Next: ")[2].splitlines()[0])
    assert command[-2:] == [f"{tmp_path}/stored", named]
    monkeypatch.setattr(plugins, "_imported", {})
    assert main(command[command.index("eval") :]) == 0


@pytest.mark.long  # test_entry_points.py closes the output of other commands
def test_nobody_need_read_what_is_said(tmp_path):
    """As of `hybridnorm convert ... | head`: what was asked for is the directory."""
    words = ["convert", str(GOLDENS / "hf_gpt2"), str(tmp_path / "out"), "--form", "pre_rmsnorm"]
    command = shlex.join([sys.executable, "-m", "hybridnorm_jax", *words])
    done = subprocess.run(f"{command} | true; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", check=False)
    assert done.returncode == 0
    assert (tmp_path / "out/config.yaml").exists()


def test_float64_parameters(tmp_path, capsys):
    assert (
        main(["convert", str(GOLDENS / "hf_opt"), str(tmp_path / "o"), "--form", "pre_rmsnorm", "--dtype", "float64"])
        == 0
    )
    assert not jax.config.read("jax_enable_x64")  # as it was before the command
    jax.config.update("jax_enable_x64", True)
    try:
        source = read_directory(str(tmp_path / "o"))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert {leaf.dtype for leaf in jax.tree.leaves(source.params)} == {np.dtype("float64")}


def test_a_tokenizer_comes_along(tmp_path, capsys):
    import tokenizers

    directory = tmp_path / "hf"
    shutil.copytree(GOLDENS / "hf_gpt2", directory)
    words = {chr(33 + number): number for number in range(60)} | {"</s>": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert main(["convert", str(directory), str(tmp_path / "o"), "--form", "pre_rmsnorm"]) == 0
    assert "text (tokenizer.json)" in capsys.readouterr().out
    assert read_directory(str(tmp_path / "o")).config.data.tokenizer == str(tmp_path / "o" / "tokenizer.json")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.long)])
def test_matrices_of_float16_beside_norms_of_float32(dtype, tmp_path, capsys):
    """Nothing of either is rounded before it is converted."""
    from safetensors.numpy import load_file, save_file

    directory = tmp_path / "hf"
    shutil.copytree(GOLDENS / "hf_gpt2", directory)
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: each.astype("float32" if ".ln_" in name else "float16") for name, each in tensors.items()}
    assert {each.dtype.name for each in tensors.values()} == {"float16", "float32"}
    save_file(tensors, directory / "model.safetensors")
    words = [str(directory), str(tmp_path / "o"), "--form", "pre_crmsnorm", "--dtype", dtype]
    assert main(["convert", *words]) == 0
    rows = _rows(capsys.readouterr().out)
    assert rows["float64"][0] < 1e-13
    assert rows["as written"][0] < (1e-5 if dtype == "float32" else 1e-13)
    with in_float64():
        tokens = np.load(GOLDENS / "hf_gpt2" / "golden.npz")["tokens"]
        (config, params), source = hn.load_huggingface(directory, dtype="float64"), read_directory(str(tmp_path / "o"))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(source.params)} == {dtype}
        expected, found = (
            jax.jit(hn.Decoder(dataclasses.replace(each, dtype="float64")).apply)({"params": tree}, tokens)
            for each, tree in ((config, params), (source.config.model, source.params))
        )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("form", [pytest.param("pre_rmsnorm", marks=pytest.mark.long), "pre_crmsnorm"])
def test_a_mean_that_is_still_subtracted_is_named_and_counted(form, tmp_path, capsys):
    """Of a decoder with a norm of tokens and positions together; what was converted is exported and read again."""
    config = hn.ModelConfig(
        **{"scheme": "pre", "norm": "layernorm", "norm_bias": True, "embedding_norm": "true", "positions": "learned"},
        **{"max_positions": 600, "d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 257},
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(config))
    hn.save_huggingface(tmp_path / "hf", config, params, architecture="hybridnorm")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "o"), "--form", form]) == 0
    printed = capsys.readouterr().out
    assert _rows(printed)["float64"][0] < 1e-12
    assert (
        "means over the channels that are still subtracted: 1\n"
        "  the stream behind the norm after the embedding (model.embedding_centring)\n"
    ) in printed
    assert main(["export", str(tmp_path / "o"), str(tmp_path / "e")]) == 0
    (converted, theirs), source = hn.load_huggingface(tmp_path / "e"), read_directory(str(tmp_path / "o"))
    assert (converted.embedding_centring, converted.whole_outside) == (True, form == "pre_crmsnorm")
    assert mathematics(converted) == mathematics(source.config.model)
    jax.tree.map(np.testing.assert_array_equal, theirs, source.params)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("post", "model.scheme=post: a post norm at attention of layer 0"),
        ("sandwich", "model.scheme=sandwich: a branch norm at attention of layer 0"),
        ("qkv_pre", "model.scheme=qkv_pre: attention of layer 0 reads the stream without a norm"),
    ],
)
def test_a_config_json_with_other_norms_is_refused_by_where_they_stand(scheme, message, tmp_path, capsys):
    config = hn.ModelConfig(scheme=scheme, norm="layernorm", d_model=16, num_layers=2, num_heads=2, vocab_size=61)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_params(config))
    hn.save_huggingface(tmp_path / "hf", config, params, architecture="hybridnorm")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "o"), "--form", "pre_rmsnorm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'hf'}: {message}")
    assert not (tmp_path / "o").exists()


def test_zero_logits_are_equal_logits(tmp_path, capsys):
    directory = tmp_path / "hf"
    config, params = hn.load_huggingface(GOLDENS / "hf_gpt2")
    params["token_embedding"]["embedding"][:] = 0
    hn.save_huggingface(directory, config, params)
    assert main(["convert", str(directory), str(tmp_path / "o"), "--form", "pre_crmsnorm"]) == 0
    assert _rows(capsys.readouterr().out)["float64"] == [0.0] * 6


def test_rounding_that_spoils_what_is_written_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(proof, "LARGEST_WRITTEN", 1e-9)
    assert main(["convert", str(GOLDENS / "hf_gpt2"), str(tmp_path / "o"), "--form", "pre_rmsnorm"]) == 2
    assert "as written, relative; nothing is written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_printed_next_commands_run(tmp_path, capsys):
    """Of a directory without a tokenizer, on a file of tokens."""
    for seed, name in enumerate(("F.npy", "V.npy")):
        np.save(tmp_path / name, np.random.default_rng(seed).integers(0, 61, 4000).astype(np.uint16))
    out = tmp_path / "o"
    assert main(["convert", str(GOLDENS / "hf_gpt2"), str(out), "--form", "pre_rmsnorm"]) == 0
    first, second = [line.partition("hybridnorm ")[2] for line in capsys.readouterr().out.splitlines()[-2:]]
    for line in (first, second):
        for name in ("F.npy", "V.npy"):
            line = line.replace(name, str(tmp_path / name))
        command, *words = shlex.split(line.replace("NAME", "further"))
        short = ["train.steps=1", "train.batch_size=8"] if command == "train" else []
        assert main([command, *words, *short]) == 0


def test_a_wrong_conversion_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoder_forms, "recenter", lambda params, layout: params)
    assert main(["convert", str(GOLDENS / "hf_gpt2"), str(tmp_path / "o"), "--form", "pre_rmsnorm"]) == 2
    captured = capsys.readouterr()
    assert "in float64" in captured.err
    assert "nothing is written" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf_llama", "OUT", "--form", "pre_rmsnorm"], "model.norm=rmsnorm: only LayerNorm"),
        (["hf_olmo2", "OUT", "--form", "pre_crmsnorm"], "model.norm=rmsnorm"),
        (["hf_gpt2", "OUT", "--form", "pre_rmsnorm", "--pad-to", "8"], "--pad-to 8: only for --form pre_crmsnorm"),
        (["hf_gpt2", "OUT", "--form", "pre_crmsnorm", "--pad-to", "0"], "--pad-to 0: must be at least 1"),
        (["hf_gpt2", ".", "--form", "pre_rmsnorm"], ".: exists already"),
        (["hf_nothing", "OUT", "--form", "pre_rmsnorm"], "hf_nothing"),
        (["hf_gpt2", "OUT", "--form", "pre_rmsnorm", "--text", "/nowhere"], "--text /nowhere: cannot be read"),
        ([".", "OUT", "--form", "pre_rmsnorm"], "no complete checkpoint there"),
        (
            ["EMPTY", "OUT", "--form", "pre_rmsnorm"],
            "holds neither a config.json (Hugging Face) nor checkpoints (a run)",
        ),
        (["README.md", "OUT", "--form", "pre_rmsnorm"], "README.md: not a directory"),
        (["hf_gpt2", "README.md/o", "--form", "pre_rmsnorm"], "README.md/o: cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_converted_ends_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(GOLDENS)
    empty = tmp_path.parent / f"{tmp_path.name}-empty"
    empty.mkdir()
    words = [{"OUT": str(tmp_path / "o"), "EMPTY": str(empty)}.get(word, word) for word in words]
    assert main(["convert", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []
