"""NumPy and raw token files, read in place."""

import io

import numpy as np
import pytest
from etils import epath

from hybridnorm_jax.data import DataError, blocks
from hybridnorm_jax.data.token_files import open_token_file, split_extents


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write(directory, name, content) -> epath.Path:
    (directory / name).write_bytes(content)
    return epath.Path(directory / name)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_a_numpy_file_carries_its_dtype(tmp_path, dtype):
    tokens = np.arange(10, dtype=dtype)
    array = open_token_file(write(tmp_path, "a.npy", npy(tokens)), "uint16")
    np.testing.assert_array_equal(array[:], tokens)
    assert array.dtype == tokens.dtype


@pytest.mark.parametrize("name", ["a.bin", "olmo.npy"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_file_without_numpys_magic_is_raw(tmp_path, name, dtype):
    tokens = np.array([1, 65_535, 3], dtype)
    array = open_token_file(write(tmp_path, name, tokens.tobytes()), dtype)
    np.testing.assert_array_equal(array[:], tokens)


TOKENS = np.arange(100, dtype=np.uint16)


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def shaped(shape: str) -> bytes:
    return npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}}}\n") + b"\0" * 8


BAD_FILES = {
    "brackets": (npy_header("(" * 500), ["header"]),
    "open string": (npy_header("{'a': '''"), ["header"]),
    "signs": (npy_header("-" * 9000 + "1"), ["header"]),
    "old long": (npy_header("{'shape': (4L,"), ["header"]),
    "negative": (shaped("(-4,)"), []),
    "boolean": (shaped("(True,)"), []),
    "joined": (npy(TOKENS) + npy(TOKENS), ["follow the 100 tokens", "data.files"]),
    "truncated": (npy(TOKENS)[:-10], ["328 bytes", "has 318", "truncated"]),
    "header": (npy(TOKENS)[:40], ["header"]),
    "odd": (b"123", ["3 bytes", "uint16", "data.token_dtype"]),
    "empty": (b"", ["no tokens"]),
    "no tokens": (npy(TOKENS[:0]), ["no tokens"]),
    "matrix": (npy(TOKENS.reshape(10, 10)), ["(10, 10)", "1-D"]),
    "floats": (npy(TOKENS.astype(np.float32)), ["float32", "uint16"]),
    "two arrays": (npy(TOKENS) * 2, ["328 bytes follow", "100 tokens"]),
    "negative length": (npy(TOKENS).replace(b"(100,)", b"(-99,)"), ["damaged", "-99"]),
    "a lie": (npy(TOKENS).replace(b"(100,)", b"(1**9,"), ["header"]),
    "text": (b"This is plain text, long enough to be sure of it.", ["data.source=text"]),
    "lfs": (b"version https://git-lfs.github.com/spec/v1", ["git lfs pull"]),
    "objects": (npy(np.array([{}, {}], dtype=object)), ["object", "uint16"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path, case):
    content, words = BAD_FILES[case]
    path = write(tmp_path, "a.npy", content)
    with pytest.raises(DataError) as error:
        open_token_file(path, "uint16")
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_cannot_be_mapped_is_named():
    with pytest.raises(DataError, match=r"gs://bucket/a\.npy: .*local"):
        open_token_file(epath.Path("gs://bucket/a.npy"), "uint16")


def stretches(extents):
    return [(extent.name.rsplit("/")[-1], extent.start, extent.stop) for extent in extents]


@pytest.fixture
def blocks_of_ten(monkeypatch):
    monkeypatch.setattr(blocks, "block_length", lambda start: 10)


def tokens_of(extents):
    return {(name, place) for name, start, stop in stretches(extents) for place in range(start, stop)}


@pytest.mark.usefixtures("blocks_of_ten")
def test_every_token_is_in_exactly_one_split_and_blocks_stay_whole():
    arrays = {epath.Path(f"/d/{name}"): np.zeros(size) for name, size in (("a", 1005), ("b", 7), ("c", 400))}
    train, held_out = split_extents(arrays, ("a", "b", "c"), 0.3)
    assert tokens_of(train) | tokens_of(held_out) == {(p.name, i) for p, a in arrays.items() for i in range(len(a))}
    assert not tokens_of(train) & tokens_of(held_out)
    assert 0.2 < len(tokens_of(held_out)) / 1412 < 0.4
    edges = [(name, edge) for name, *both in stretches(train + held_out) for edge in both]
    assert all(edge % 10 == 0 or edge == len(arrays[epath.Path(f"/d/{name}")]) for name, edge in edges)


@pytest.mark.usefixtures("blocks_of_ten")
def test_the_split_survives_moving_and_growing():
    here = split_extents({epath.Path("/here/a"): np.zeros(500)}, ("a",), 0.3)
    there = {epath.Path("/there/z"): np.zeros(300), epath.Path("/there/a"): np.zeros(900)}
    moved = split_extents(there, ("z", "a"), 0.3)
    for before, after in zip(here, moved, strict=True):
        assert tokens_of(before) == {(name, place) for name, place in tokens_of(after) if name == "a" and place < 500}


def test_without_a_held_out_share_a_file_is_one_piece():
    arrays = {epath.Path("/d/a"): np.zeros(200_000)}
    assert [stretches(split) for split in split_extents(arrays, ("a",), 0.0)] == [[("a", 0, 200_000)], []]
    assert [stretches(split) for split in split_extents(arrays, ("a",), 1.0)] == [[], [("a", 0, 200_000)]]
