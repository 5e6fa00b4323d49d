"""Compiled programs are kept in the user's cache folder, unless JAX's own variables or the folder say otherwise."""

import os
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest

from hybridnorm_jax.commands import program_cache
from hybridnorm_jax.commands.program_cache import MOST_BYTES, keep_programs, processor_key, program_folder
from hybridnorm_jax.whole_files import user_cache_folder

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)
VARIABLES = [name.upper() for name in NAMES]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Reads JAX's settings of its cache, which are as they were after the test. No variable is set."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield lambda: {name: getattr(jax.config, name) for name in NAMES}
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_a_folder_of_the_processor_and_bounded(settings, tmp_path, capsys):
    keep_programs()
    folder = tmp_path / "hybridnorm_jax" / "programs" / processor_key()
    assert settings()["jax_compilation_cache_dir"] == str(folder)
    assert settings()["jax_compilation_cache_max_size"] == MOST_BYTES == 4 * 2**30
    assert folder.is_dir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # what lies in it is executed
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_where_jax_is_told_about_the_cache_nothing_changes(name, settings, tmp_path, monkeypatch):
    monkeypatch.setenv(name, str(tmp_path / "mine"))
    if name == "JAX_ENABLE_COMPILATION_CACHE":  # which JAX reads when it is imported
        jax.config.update("jax_enable_compilation_cache", False)
    before = settings()
    keep_programs()
    assert settings() == before
    assert not (tmp_path / "hybridnorm_jax").exists()


def test_a_size_and_a_time_that_jax_is_told_stay(settings, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "12345")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    before = settings()
    keep_programs()
    assert settings() | {"jax_compilation_cache_dir": before["jax_compilation_cache_dir"]} == before


@pytest.mark.parametrize("speaks", [True, False])
def test_a_folder_that_cannot_be_made_is_one_line_of_one_process(speaks, settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = settings()
    keep_programs(speaks=speaks)
    assert settings() == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == speaks
    for line in lines:
        assert line.startswith("compiled programs are not kept: ")
        assert str(tmp_path / "file") in line
        assert line.endswith("JAX_COMPILATION_CACHE_DIR names another folder")


def test_a_folder_of_another_user_is_not_used(settings, monkeypatch, capsys):
    monkeypatch.setattr(os, "getuid", lambda: program_folder().parent.parent.parent.stat().st_uid + 1)
    keep_programs()
    assert "another user's" in capsys.readouterr().err


def test_a_user_without_a_home_is_told(settings, monkeypatch, capsys):
    monkeypatch.setattr(program_cache, "user_cache_folder", lambda: None)
    keep_programs()
    (line,) = capsys.readouterr().err.splitlines()
    assert "this user has no home directory" in line


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):  # which the XDG Base Directory Specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert user_cache_folder() == tmp_path / ".cache" / "hybridnorm_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert str(user_cache_folder()) == "/var/cache/me/hybridnorm_jax"


def test_the_key_tells_processors_and_numbers_of_cores_apart(monkeypatch):
    key = processor_key()
    assert key == processor_key()
    monkeypatch.setattr(program_cache, "_features", lambda: ["flags: fpu vme avx512f amx"])
    other = processor_key()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(97)), raising=False)
    assert len({key, other, processor_key()}) == 3


@pytest.mark.long
def test_the_second_training_finds_what_the_first_compiled(tmp_path):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 257, 4000).astype(np.uint16))
    tiny = ["model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "model.vocab_size=257"]
    tiny += ["train.batch_size=8", "train.seq_len=8", "train.steps=2", "train.sample_tokens=0", "data.source=tokens"]
    tiny += ["data.files=[tokens.npy]", "data.validation.train_all=[tokens.npy]", "train.check_invariants=false"]
    tiny += ["run.dir=runs", "optimizer.schedule=constant", "data.validation_fraction=0"]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}

    def train(name):
        line = [sys.executable, "-m", "hybridnorm_jax", "train", *tiny, f"run.name={name}"]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {file.name for file in (tmp_path / "cache").rglob("*-cache")}

    first = train("first")
    assert any("train_step" in name for name in first)
    assert train("second") == first
