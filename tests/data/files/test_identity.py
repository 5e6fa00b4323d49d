"""What makes data files the same files."""

import os
import shutil

import pytest

from hybridnorm_jax.data.files.identity import PIECE_BYTES, WHOLE_BYTES, file_identity, identities
from hybridnorm_jax.errors import DataError


def test_a_name_a_size_and_content_make_an_identity(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1234")
    first = file_identity(tmp_path / "a.bin")
    assert (first.name, first.size) == ("a.bin", 4)
    (tmp_path / "a.bin").write_bytes(b"1235")
    assert file_identity(tmp_path / "a.bin").digest != first.digest


def test_a_time_of_last_change_is_no_part_of_it(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1234")
    first = file_identity(tmp_path / "a.bin")
    os.utime(tmp_path / "a.bin", ns=(0, 1))
    assert file_identity(tmp_path / "a.bin") == first


@pytest.mark.parametrize("place", [0, PIECE_BYTES - 1, -1, -PIECE_BYTES])
def test_a_large_file_is_sampled_at_both_ends(tmp_path, place):
    content = bytearray(3 * WHOLE_BYTES + 5)
    (tmp_path / "a.bin").write_bytes(content)
    first = file_identity(tmp_path / "a.bin")
    content[place] = 1
    (tmp_path / "a.bin").write_bytes(content)
    assert file_identity(tmp_path / "a.bin").digest != first.digest


def test_a_file_below_the_samples_size_is_read_whole(tmp_path):
    content = bytearray(WHOLE_BYTES)
    (tmp_path / "a.bin").write_bytes(content)
    first = file_identity(tmp_path / "a.bin")
    for place in range(1, len(content), len(content) // 7):
        changed = bytearray(content)
        changed[place] = 1
        (tmp_path / "a.bin").write_bytes(changed)
        assert file_identity(tmp_path / "a.bin").digest != first.digest


def test_one_name_in_two_directories_is_two_names_and_moving_all_changes_none(tmp_path):
    for directory in ("a", "b"):
        (tmp_path / "old" / directory).mkdir(parents=True)
        (tmp_path / "old" / directory / "part.npy").write_bytes(directory.encode())
    paths = [tmp_path / "old" / "a" / "part.npy", tmp_path / "old" / "b" / "part.npy"]
    before = identities(paths)
    assert [identity.name for identity in before] == ["a/part.npy", "b/part.npy"]
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = [tmp_path / "new" / path.relative_to(tmp_path / "old") for path in paths]
    assert identities(moved) == before
    assert identities(reversed(moved)) == before[::-1]
    assert identities(moved[:1], root=tmp_path / "new") == before[:1]
    assert [identity.name for identity in identities(moved[:1])] == ["part.npy"]


def test_exchanged_files_of_one_size_are_other_data(tmp_path):
    (tmp_path / "0.npy").write_bytes(b"zero")
    (tmp_path / "1.npy").write_bytes(b"one!")
    paths = [tmp_path / "0.npy", tmp_path / "1.npy"]
    before = identities(paths)
    (tmp_path / "0.npy").write_bytes(b"one!")
    (tmp_path / "1.npy").write_bytes(b"zero")
    assert identities(paths) != before


def test_a_pipe_a_device_and_a_missing_file_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, right in ((tmp_path / "pipe", "no regular file"), ("/dev/zero", "no regular file"), ("/no", "No such")):
        with pytest.raises(DataError, match=right) as error:
            file_identity(path)
        assert str(error.value).startswith(f"{path}: ")
