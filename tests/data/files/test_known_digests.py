"""Files that have not changed are not read again, and every change is seen."""

import json
import os
import time

import numpy as np
import pytest

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import open_data
from hybridnorm_jax.data.files import identity, known_digests
from hybridnorm_jax.data.files.identity import identities


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files that are a while old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_digests, "SETTLED_NS", 0)
    paths = [tmp_path / name for name in ("a.bin", "b.bin")]
    for path in paths:
        path.write_bytes(path.name.encode())
    time.sleep(0.02)  # so that their times lie before every "now", whatever the clock's steps
    return paths


@pytest.fixture
def opened(monkeypatch):
    """The names of files whose content is read."""
    names, read = [], identity._digest
    monkeypatch.setattr(identity, "_digest", lambda path, size: names.append(path.name) or read(path, size))
    return names


def test_files_are_read_once(files, opened):
    first = identities(files)
    assert sorted(opened) == ["a.bin", "b.bin"]
    opened.clear()
    assert identities(files) == first
    assert opened == []


def test_only_the_file_that_has_changed_is_read_again(files, opened):
    first = identities(files)
    opened.clear()
    files[1].write_bytes(b"B.BIN")
    assert identities(files)[0] == first[0]
    assert identities(files)[1] != first[1]
    assert set(opened) == {"b.bin"}


def test_a_change_that_keeps_the_size_and_sets_the_time_back_is_seen(files):
    first, status = identities(files), os.stat(files[0])
    time.sleep(0.02)
    files[0].write_bytes(b"A.BIN")
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert identities(files)[0].digest != first[0].digest


def test_a_file_that_was_put_in_the_place_of_another_is_seen(files, tmp_path):
    first, status = identities(files), os.stat(files[0])
    (tmp_path / "other").write_bytes(b"A.BIN")
    os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "other").replace(files[0])
    assert identities(files)[0].digest != first[0].digest


def test_a_file_that_was_changed_a_moment_ago_is_read_again(files, opened, monkeypatch):
    monkeypatch.setattr(known_digests, "SETTLED_NS", 60 * 10**9)
    identities(files)
    opened.clear()
    identities(files)
    assert sorted(opened) == ["a.bin", "b.bin"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff"])
def test_a_damaged_file_of_digests_is_as_none(damage, files, tmp_path):
    first = identities(files)
    (kept,) = (tmp_path / "cache/hybridnorm_jax/digests").iterdir()
    assert len(json.loads(kept.read_text())) == 2
    kept.write_bytes(damage)
    assert identities(files) == first


def test_a_cache_folder_that_cannot_be_written_changes_nothing(files, tmp_path, monkeypatch):
    first = identities(files)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert identities(files) == first
    monkeypatch.setattr(known_digests, "user_cache_folder", lambda: None)
    assert identities(files) == first


def test_the_oldest_lists_are_removed(files, tmp_path, monkeypatch):
    monkeypatch.setattr(known_digests, "MOST_KEPT", 2)
    for chosen in (files, files[:1], files[1:]):
        identities(chosen)
        time.sleep(0.02)
    assert len(list((tmp_path / "cache/hybridnorm_jax/digests").iterdir())) == 2


def test_text_that_was_tokenized_is_found_again_without_reading_it(tmp_path, files, opened):
    words = np.random.default_rng(0).integers(97, 123, 20000).astype(np.uint8).tobytes()
    (tmp_path / "book.txt").write_bytes(b"\n".join(words[start : start + 50] for start in range(0, len(words), 50)))
    time.sleep(0.02)
    data = DataSection(source="text", files=(f"{tmp_path}/book.txt",), cache_dir=str(tmp_path / "tokens"))
    first = open_data(data, seq_len=8, vocab_size=257, progress=False)
    opened.clear()
    second = open_data(data, seq_len=8, vocab_size=257, progress=False)
    assert opened == []
    assert second.first.files == first.first.files
