"""A user whom the system does not know: no HOME, and no entry in its list of users, as in OpenShift."""

import os
import pwd

import numpy as np
import pytest

from hybridnorm_jax.commands.main import main

TINY = [
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "model.vocab_size=257"),
    *("train.batch_size=8", "train.seq_len=8", "train.sample_tokens=0", "data.source=tokens"),
    *("optimizer.schedule=constant", "model.norm=layernorm", "model.norm_bias=true", "model.scheme=pre"),
]


pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def unknown_user(tmp_path, monkeypatch):
    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


@pytest.fixture
def arguments(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 257, 4000).astype(np.uint16))
    return [*TINY, f"data.files=[{path}]", f"data.validation.train_all=[{path}]", f"run.dir={tmp_path}/runs"]


@pytest.mark.long
@pytest.mark.usefixtures("unknown_user")
def test_everything_that_reads_a_checkpoint_works(arguments, tmp_path, capsys):
    def run(*words):
        status = main(list(words))
        assert status == 0, capsys.readouterr().err

    run("train", *arguments, "run.name=first", "train.steps=2")
    run("train", *arguments, "run.name=first", "train.steps=3")  # resumes
    run("train", *arguments, "run.name=second", f"init_from={tmp_path}/runs/first", "train.steps=1")
    run("eval", f"{tmp_path}/runs/first")
    run("convert", f"{tmp_path}/runs/first", f"{tmp_path}/small", "--form", "pre_rmsnorm")


@pytest.mark.usefixtures("unknown_user")
@pytest.mark.parametrize("key", ["run.dir=~/runs", "init_from=~/run", "data.files=[~/a.npy]", "run.plugins=[~/a.py]"])
def test_a_path_below_a_home_that_is_not_known_is_refused(key, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    assert main(["train", *arguments, key]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": this user has no home directory; write the whole path")
    assert "~/" in line
    assert sorted(os.listdir()) == before


def test_all_of_a_run_is_below_the_home_directory_that_is_asked_for(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments, "run.dir=~/runs", "run.name=mine", "train.steps=1"]) == 0
    assert {"config.yaml", "checkpoints", "metrics.jsonl"} <= set(os.listdir(tmp_path / "home/runs/mine"))
    assert not (tmp_path / "~").exists()
