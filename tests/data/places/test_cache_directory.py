"""Where tokenized text is kept without a home directory, or with one that cannot be written to."""

import os
import pathlib

import pytest

from hybridnorm_jax.data.places import cache_directory
from hybridnorm_jax.data.places.cache_directory import DEFAULT, cache_root
from hybridnorm_jax.errors import DataError


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The temporary directory of the system."""
    monkeypatch.setattr(cache_directory.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the system's list of users."""

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)


def test_without_a_home_directory_it_is_in_the_temporary_one(homeless, temporary, capsys):
    root = cache_root(DEFAULT, "wanted")
    assert root == temporary / f"hybridnorm_jax-{os.getuid()}"
    assert root.stat().st_mode & 0o777 == 0o700
    line = f"data.cache_dir={DEFAULT}: this user has no home directory; tokenized text is kept in {root}\n"
    assert capsys.readouterr().err == line
    assert cache_root(DEFAULT, "wanted") == root


def test_a_path_that_was_asked_for_is_never_another_one(homeless):
    with pytest.raises(DataError, match=r"^data\.cache_dir=~/mine: this user has no home directory; name another one"):
        cache_root("~/mine", "wanted")


def test_a_home_directory_that_cannot_be_written_to(tmp_path, temporary, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/.cache/hybridnorm_jax").mkdir(parents=True)
    assert cache_root(DEFAULT, "wanted") == tmp_path / "home/.cache/hybridnorm_jax"
    monkeypatch.setattr(cache_directory.os, "access", lambda *_: False)  # root may write anywhere
    assert cache_root(DEFAULT, "wanted").parent == temporary
    assert "it cannot be written to" in capsys.readouterr().err
    (tmp_path / "home/.cache/hybridnorm_jax/wanted").mkdir()
    assert cache_root(DEFAULT, "wanted") == tmp_path / "home/.cache/hybridnorm_jax"  # it is there to be read


def test_another_users_directory_is_not_used(homeless, temporary):
    (temporary / f"hybridnorm_jax-{os.getuid()}").symlink_to("/")
    with pytest.raises(DataError, match="is another user's; name another directory"):
        cache_root(DEFAULT, "wanted")
