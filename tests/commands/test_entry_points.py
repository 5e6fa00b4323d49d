"""train.py and eval.py as a user meets them: help, and wrong inputs that end in one line and status 2."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.arguments import parse

REPOSITORY = Path(__file__).parents[2]
TINY = [
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16"),
    *("train.steps=2", "train.batch_size=8", "train.seq_len=8", "train.sample_tokens=0"),
]


@pytest.fixture
def tokens_file(tmp_path):
    """A token file of 400 ids below 257."""
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 257, 400).astype(np.uint16))
    return path


def _train(tmp_path, *words):
    return main(["train", f"run.dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache", *TINY, *words])


def _one_line(capsys):
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.shceme=span"], r"model\.shceme=span: no such key; did you mean 'model\.scheme'\?"),
        (["train.steps=many"], "train.steps=many: expected an integer"),
        (["model.num_heads=5"], "model.num_heads=5: must divide model.d_model=16"),
        (["mesh.data=3"], "must multiply to the 8 devices there are"),
        (
            ["train.batch_size=9"],
            "train.batch_size / train.grad_accumulation: 9 sequences at a time, must be a multiple",
        ),
        (["model.attention=cudnn"], "model.attention=cudnn: needs platform gpu, this is cpu"),
        (
            ["model.positions=learned", "model.max_positions=4"],
            "train.seq_len=8: must be at most model.max_positions=4",
        ),
        (["missing.yaml"], "missing.yaml: cannot be read"),
        (["run.wandb=true"], "pip install hybridnorm-jax[wandb]"),
        (["init_from=/nowhere"], "/nowhere: no such directory"),
        (["run.dir=/proc/nope"], "/proc/nope"),
        (["run.name=.."], "run.name=..: must be a plain directory name"),
        (["model.dtype=float64"], "model.dtype=float64: needs JAX_ENABLE_X64=1"),
        (["data.source=text"], "data.files=[]: data.source=text needs at least one file"),
        (["data.source=text", "data.files=[/nowhere/*.txt]"], "/nowhere/*.txt"),
        (["model.vocab_size=100"], "set model.vocab_size to at least 257"),
    ],
    ids=str,
)
def test_what_cannot_be_ends_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert _train(tmp_path, *words) == 2
    line = _one_line(capsys)
    assert message.replace("\\", "") in line


def test_bad_token_files_are_named(tmp_path, tokens_file, capsys):
    tokens = ["data.source=tokens", f"data.files=[{tokens_file}]", "data.validation_fraction=0"]
    assert _train(tmp_path, *tokens, "model.vocab_size=100") == 2
    line = _one_line(capsys)
    assert f"{tokens_file}: token " in line
    assert "outside model.vocab_size=100" in line
    assert _train(tmp_path, *tokens, "train.seq_len=500") == 2
    assert "a window needs 501 tokens, but there are 400" in _one_line(capsys)
    tokens_file.write_bytes(tokens_file.read_bytes()[:-10])
    assert _train(tmp_path, *tokens) == 2
    assert str(tokens_file) in _one_line(capsys)


def test_no_space_left_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "runs/x/config.yaml"))

    monkeypatch.setattr("hybridnorm_jax.training.loop.open_run_directory", full)
    assert _train(tmp_path) == 2
    assert "config.yaml: No space left on device" in _one_line(capsys)


def test_help_names_every_key_with_the_files_values(capsys):
    assert main(["train", str(REPOSITORY / "configs/151m.yaml"), "--help"]) == 0
    text = capsys.readouterr().out
    assert "model.scheme" in text
    assert "100352" in text
    assert max(map(len, text.splitlines())) <= 120
    assert main(["eval", "--help"]) == 0
    assert "RUN_DIR" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["model.scheme=pre"], ["/nowhere"], ["--json"]], ids=str)
def test_eval_needs_a_run(words, capsys):
    assert main(["eval", *words]) == 2
    assert _one_line(capsys)


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one(config):
    files = ["data.files=[/data/x.npy]"] if "source: tokens" in config.read_text() else []
    for scheme in ("pre", "span", "qkvc_post"):
        parsed = parse([str(config), *files, f"model.scheme={scheme}"])
        assert parsed.model.scheme == scheme


def test_the_scripts_are_the_package(tmp_path):
    """The two files at the top run from anywhere and return the status."""
    for script, words in (("train.py", ["model.scheme=hybird"]), ("eval.py", [str(tmp_path)])):
        command = [sys.executable, str(REPOSITORY / script), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


def test_schemes_print_as_tables(capsys):
    assert main(["schemes", "hybrid_star", "span", "3"]) == 0
    assert "layers 1-2" in capsys.readouterr().out
    assert main(["schemes", "hybird"]) == 2
    assert _one_line(capsys) == "error: hybird: no such scheme; did you mean 'hybrid'?"
