"""What `hybridnorm convert` and `plan` cannot use ends in one line, and nothing is left behind."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybridnorm_jax.commands.main import main

GPT2 = Path(__file__).parents[1] / "goldens" / "hf_gpt2"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs a command in tmp_path and returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return line.removeprefix("error: ")

    return run


@pytest.fixture
def model(tmp_path):
    """A copy of a small GPT-2."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GPT2 / name, directory / name)
    return directory


# ---- What is converted

NO_DIRECTORIES = {
    "nowhere": "no such directory",
    "file.txt": "not a directory; name the directory that holds it",
    "model.pt": "a pickle, which can run any code and is never read; convert it to safetensors",
    "pipe": "not a directory",
    "/dev/zero": "not a directory",
    "loop": "no such directory",
    "dangling": "no such directory",
    "a" * 300: "File name too long",
    "x\ny": "no such directory",
    "gs://bucket/x": "no such directory",
    "model@3": "model@3: model is a Hugging Face directory, which has no steps; name it alone",
    "empty": "holds neither a config.json (Hugging Face) nor checkpoints (a run)",
    "pickles": "pytorch_model.bin: a pickle, which can run any code",
}


@pytest.mark.parametrize("source", NO_DIRECTORIES, ids=lambda text: text[:9])
def test_a_source_that_is_none(refused, model, tmp_path, source):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "model.pt").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_text("x")
    assert NO_DIRECTORIES[source] in refused("convert", source, "out", "--form", "pre_rmsnorm")


GPT2_CLASS = '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]'
WRONG_FILES = {
    ("config.json", ""): "config.json: cannot be read as JSON",
    ("config.json", "[" * 100_000): "config.json: its value: nested too deeply",
    ("config.json", '{"model_type": "gpt2", "n_embd": ' + "9" * 6000 + "}"): "config.json: n_embd: an integer of 6,000",
    ("config.json", f'{GPT2_CLASS}, "n_layer": 1000000000}}'): "config.json: n_layer=1000000000 is out of range",
    ("config.json", f'{GPT2_CLASS}, "x\\ny": 1}}'): r"config.json: x\ny=1 is not known for gpt2",
    ("config.json", '{"model_type": "gpt2", "x": 1}'): "config.json: architectures is missing; it must be",
    ("config.json", POINTER): "config.json: a pointer of git-lfs, not the file itself; run `git lfs pull`",
    ("model.safetensors", ""): "model.safetensors: damaged or cut off",
    ("model.safetensors", "PK\x03\x04" * 50): "model.safetensors: damaged or cut off",
    ("model.safetensors", POINTER): "model.safetensors: a pointer of git-lfs",
    ("tokenizer.json", POINTER): "tokenizer.json: a pointer of git-lfs",
    ("tokenizer.json", "{}"): "tokenizer.json: not a tokenizer.json",
}


@pytest.mark.parametrize(("name", "text"), WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_file_of_the_source_that_is_none(refused, model, name, text):
    (model / name).write_text(text)
    assert WRONG_FILES[name, text] in refused("convert", str(model), "out", "--form", "pre_rmsnorm")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_is_a_link_a_pipe_or_a_directory(refused, model, name):
    file = model / name
    file.unlink(missing_ok=True)
    convert = ["convert", str(model), "out", "--form", "pre_rmsnorm"]
    for target in ("/etc/passwd", "/dev/zero"):
        file.symlink_to(target)
        assert f"{name}: a symbolic link that leaves the directory" in refused(*convert)
        file.unlink()
    os.mkfifo(file)
    assert f"{name}: must be a regular file" in refused(*convert)
    file.unlink()
    file.mkdir()
    assert f"{name}: must be a regular file" in refused(*convert)


def test_tensors_of_several_dtypes_are_converted(model, tmp_path, capsys):
    """Such as a GPT-2 with float16 matrices and float32 norms."""
    arrays = load_file(model / "model.safetensors")
    save_file(
        {name: array.astype(np.float16) if array.ndim == 2 else array for name, array in arrays.items()},
        model / "model.safetensors",
    )
    for dtype in ("float32", "float64"):
        out = tmp_path / dtype
        assert main(["convert", str(model), str(out), "--form", "pre_rmsnorm", "--dtype", dtype]) == 0
        assert f"param_dtype: {dtype}" in (out / "config.yaml").read_text()
    assert capsys.readouterr().err == ""


def test_a_key_to_ignore_that_says_what_the_others_mean(refused, model):
    line = refused("convert", str(model), "out", "--form", "pre_rmsnorm", "--ignore-key", "model_type")
    assert "model_type cannot be ignored" in line


def test_an_unknown_key_names_the_commands_own_argument(refused, model):
    document = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(document | {"wings": 2}))
    assert "convert with --ignore-key wings" in refused("convert", str(model), "out", "--form", "pre_rmsnorm")


# ---- Where the result goes

WRONG_OUTS = {
    "": "'': an empty name; name a directory",
    ".": "exists already",
    "/dev/null": "exists already",
    "/dev/null/x": "cannot be made",
    "model": "exists already",
    "model/converted": "model/converted: lies in model, which is only read; choose a directory outside of it",
    "model/../model/a/b": "lies in model",
    "link/a": "lies in model",
    "file.txt": "exists already",
    "file.txt/x": "cannot be made",
    "a/" + "b" * 240: "a name in it is longer than 200 bytes",
}


@pytest.mark.parametrize("out", WRONG_OUTS, ids=lambda text: text[:18])
def test_a_target_that_cannot_be_made(refused, model, tmp_path, out):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "link").symlink_to(model)
    assert WRONG_OUTS[out] in refused("convert", "model", out, "--form", "pre_rmsnorm")


# ---- Options

WRONG_OPTIONS = {
    ("--pad-to", "9" * 5000): "argument --pad-to: invalid int value",
    ("--pad-to", str(10**18)): "--pad-to 1000000000000000000: must be at most 1024 for a model of width 32",
    ("--pad-to", "-4"): "--pad-to -4: must be at least 1",
    ("--pad-to", "1e3"): "argument --pad-to: invalid int value: '1e3'",
    ("--text", ""): "--text .: cannot be read as UTF-8 text: no regular file",
    ("--text", "/dev/zero"): "--text /dev/zero: cannot be read as UTF-8 text: no regular file",
    ("--text", "pipe"): "--text pipe: cannot be read as UTF-8 text: no regular file",
    ("--text", "model/model.safetensors"): "--text model/model.safetensors: cannot be read as UTF-8 text",
    ("--text", "short"): "--text short: 1 tokens, 64 are needed",
    ("--dtype", "bfloat16"): "argument --dtype: invalid choice: 'bfloat16'",
}


@pytest.mark.parametrize("options", WRONG_OPTIONS, ids=lambda options: " ".join(options)[:30])
def test_an_option_that_cannot_be(refused, model, tmp_path, options):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "short").write_text("x")
    assert WRONG_OPTIONS[options] in refused("convert", "model", "out", "--form", "pre_crmsnorm", *options)


# ---- plan

WRONG_TOPOLOGIES = {
    "gpu:99999999x80GB": "a number in it has more than 6 digits",
    "9" * 5000 + "xgpu:8x80GB": "must be [SLICESx]KIND:SHAPE",
    "gpu:8x" + "9" * 400 + "GB": "a number in it has more than 6 digits",
    "900xgpu:8x80GB": "7,200 devices; at most 4,096 can be planned for",
    "gpu:0x80GB": "must be [NODESx]gpu:DEVICESxMEMORYGB",
    "x\ny": "must be [SLICESx]KIND:SHAPE",
}


@pytest.mark.parametrize("topology", WRONG_TOPOLOGIES, ids=lambda text: text[:18])
def test_a_topology_that_cannot_be(refused, topology):
    assert WRONG_TOPOLOGIES[topology] in refused("plan", "151m", "--topology", topology)


@pytest.mark.parametrize("file", ["/dev/zero", "pipe", "bytes", ".", "nowhere.md"])
def test_a_table_that_is_none(refused, tmp_path, file):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert file in refused("plan", "--table", file)


def test_settings_to_compare_that_cannot_be_split(refused):
    line = refused("plan", "151m", "--topology", "gpu:8x80GB", "--compare", "'model.remat=dots", "")
    assert line.startswith('--compare "\'model.remat=dots": cannot be split into settings: no closing quotation')
