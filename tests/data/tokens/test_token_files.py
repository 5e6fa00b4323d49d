"""NumPy and raw token files, read in place."""

import io
import os
import tracemalloc

import numpy as np
import pytest
from etils import epath

from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.text import blocks
from hybridnorm_jax.data.tokens import token_files
from hybridnorm_jax.data.tokens.token_files import OpenFiles, is_split_by_hash, open_token_file, split_extents
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream


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


def test_splitting_keeps_no_list_of_all_blocks():
    """Ten billion tokens are 150,000 blocks; what is kept are the pieces that the held-out ones leave."""
    arrays = {epath.Path(f"/nowhere/{number}"): range(10**9) for number in range(10)}
    tracemalloc.start()
    try:
        splits = split_extents(arrays, tuple("0123456789"), fraction=1e-3)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = splits.train + splits.held_out
    assert sum(extent.stop - extent.start for extent in kept) == 10**10
    assert most < 3e6  # a list of all blocks takes ten times as much


@pytest.mark.usefixtures("blocks_of_ten")
def test_the_hash_alone_decides_where_it_chooses_some_blocks_and_not_all():
    one, many = ({epath.Path("/d/a"): np.zeros(size)} for size in (10, 1000))
    assert [is_split_by_hash(one, ("a",), fraction) for fraction in (0.0, 0.3, 0.99, 1.0)] == [True, False, False, True]
    assert is_split_by_hash(many, ("a",), 0.3)


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


@pytest.mark.parametrize("dtype", [">u2", ">i4", "int64", "uint8", ">i8"])
def test_any_integers_in_a_numpy_file_are_read(tmp_path, dtype):
    tokens = np.array([1, 2, 100], dtype)
    path = write(tmp_path, "a.npy", npy(tokens))
    stream = TokenStream((Extent(open_token_file(path, "uint16"), "a", 0, 3),), 101)
    assert stream.read(0, 3).tolist() == [1, 2, 100]


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")])
def test_the_header_of_llm_c_is_no_tokens(tmp_path, magic, version, dtype):
    tokens = np.arange(50, dtype=dtype) + 40_000
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    content = header.tobytes() + tokens.tobytes()
    np.testing.assert_array_equal(open_token_file(write(tmp_path, "a.bin", content), "uint16")[:], tokens)
    with pytest.raises(DataError, match=r"truncated: its llm\.c header"):
        open_token_file(write(tmp_path, "a.bin", content[:-8]), "uint16")
    for kept in (1000, 512, 12, 4):
        with pytest.raises(DataError, match=f"truncated: its llm.c header has 1024 bytes, but the file has {kept};"):
            open_token_file(write(tmp_path, "a.bin", content[:kept]), "uint16")
    header[1] = 9
    with pytest.raises(DataError, match="version 9 of llm"):
        open_token_file(write(tmp_path, "a.bin", header.tobytes()), "uint16")
    header[0] = 20240326
    with pytest.raises(DataError, match="not tokens"):
        open_token_file(write(tmp_path, "a.bin", header.tobytes()), "uint16")


@pytest.mark.parametrize(
    ("name", "content", "wrong", "right"),
    [
        ("a.npy", npy(np.array([1, 900], "<u2")), "token 1 is 900", "set model.vocab_size to the tokenizer's"),
        ("a.npy", npy(np.array([1, -5], "<i2")), "token 1 is -5", "ids begin at 0; write them again as uint16"),
        (
            "a.bin",
            np.array([1, 900], "<u2").tobytes(),
            "token 1 is 900",
            "set model.vocab_size to the tokenizer's, and check data.token_dtype",
        ),
    ],
)
def test_an_id_outside_the_vocabulary_gets_advice_that_helps(tmp_path, name, content, wrong, right):
    """data.token_dtype is read of raw files alone, and no vocabulary has negative ids."""
    path = write(tmp_path, name, content)
    extents = split_extents({path: open_token_file(path, "uint16")}, ("a",), 0.0).train
    with pytest.raises(DataError) as error:
        TokenStream(extents, 256).read(0, 2)
    message = str(error.value)
    assert message.startswith(f"{path}: {wrong}, outside model.vocab_size=256; {right}")
    assert ("data.token_dtype" in message) == (name == "a.bin")


IDS = np.random.default_rng(0).integers(0, 50_000, 4000)
WRONG_DTYPES = [
    (IDS.astype("<u4"), "uint16", "set data.token_dtype=uint32"),
    ((IDS * 3).astype("<u4"), "uint16", "set data.token_dtype=uint32"),
    (IDS.astype("<u2"), "uint32", "set data.token_dtype=uint16"),
    (IDS.astype("<i8"), "uint16", "64-bit"),
    (IDS.astype("<i8"), "uint32", "64-bit"),
]


@pytest.mark.parametrize(("ids", "dtype", "right"), WRONG_DTYPES)
def test_raw_numbers_of_another_width_are_refused(tmp_path, ids, dtype, right):
    with pytest.raises(DataError, match=right):
        open_token_file(write(tmp_path, "a.bin", ids.tobytes()), dtype)


@pytest.mark.parametrize("ids", [IDS, IDS % 257, IDS % 3, IDS * 0, np.arange(40) * 0 + 7])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_numbers_of_the_right_width_are_read(tmp_path, ids, dtype):
    path = write(tmp_path, "a.bin", ids.astype(dtype).tobytes())
    np.testing.assert_array_equal(open_token_file(path, dtype)[:], ids)


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MOST_OPEN", 3)
    files = OpenFiles()
    arrays = [
        open_token_file(write(tmp_path, f"{number}.bin", bytes([number, 1] * 20)), "uint16", files)
        for number in range(20)
    ]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [int(array[5:6][0]) for array in arrays] == [256 + number for number in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_file_of_another_size_than_before_is_an_error(tmp_path):
    path = write(tmp_path, "a.bin", np.arange(500, dtype=np.uint16).tobytes())
    files = OpenFiles()
    tokens = open_token_file(path, "uint16", files)
    np.testing.assert_array_equal(tokens[3:5], [3, 4])
    path.write_bytes(np.arange(600, dtype=np.uint16)[::-1].tobytes())
    files.open.cache_clear()  # as if many other files had been read since
    with pytest.raises(DataError, match=r"a\.bin: has 1,200 bytes now, but had 1,000; start again"):
        tokens[3:5]


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("how", ["written again", "replaced", "removed"])
def test_a_file_that_changes_or_vanishes_in_the_middle_of_a_run(tmp_path, how, is_open):
    """What was opened before it was replaced or removed is still the same file; nothing else may be read for it."""
    path = write(tmp_path, "a.bin", np.arange(500, dtype=np.uint16).tobytes())
    os.utime(path, ns=(1, 10**18))
    files = OpenFiles()
    tokens = open_token_file(path, "uint16", files)
    np.testing.assert_array_equal(tokens[3:5], [3, 4])
    if how != "written again":
        path.unlink()
    if how != "removed":
        path.write_bytes(np.arange(500, dtype=np.uint16)[::-1].tobytes())
    if not is_open:
        files.open.cache_clear()  # as if many other files had been read since
    if is_open and how != "written again":
        np.testing.assert_array_equal(tokens[3:5], [3, 4])
        return
    words = "cannot be read \\(No such file" if how == "removed" else "was changed while it was in use; start again"
    with pytest.raises(DataError, match=rf"a\.bin: {words}"):
        tokens[3:5]


@pytest.mark.parametrize("how", ["written again", "replaced", "removed"])
def test_a_file_that_changes_before_its_first_read(tmp_path, how):
    """Its identity was taken when the run began, which may be days before its turn in a mixture."""
    path = write(tmp_path, "a.bin", np.arange(500, dtype=np.uint16).tobytes())
    os.utime(path, ns=(1, 10**18))
    tokens = open_token_file(path, "uint16")
    if how != "written again":
        path.unlink()
    if how != "removed":
        path.write_bytes(np.arange(500, dtype=np.uint16)[::-1].tobytes())
    words = "cannot be read \\(No such file" if how == "removed" else "was changed while it was in use; start again"
    with pytest.raises(DataError, match=rf"a\.bin: {words}"):
        tokens[3:5]


@pytest.mark.parametrize("which", ["targets", "ends"])
@pytest.mark.parametrize("how", ["written again", "removed"])
def test_what_lies_beside_a_file_may_not_change_before_its_first_read_either(tmp_path, which, how):
    path = write(tmp_path, "a.npy", npy(np.arange(6, dtype=np.uint16)))
    write(tmp_path, "a.targets.npy", npy(np.array([0, 1, 1, 0, 0, 1], np.uint8)))
    write(tmp_path, "a.ends.npy", npy(np.array([2, 6], np.uint64)))
    beside = tmp_path / f"a.{which}.npy"
    os.utime(beside, ns=(1, 10**18))
    other = {"targets": np.ones(6, np.uint8), "ends": np.array([3, 6], np.uint64)}[which]
    tokens = open_token_file(path, "uint16")
    beside.unlink() if how == "removed" else beside.write_bytes(npy(other))
    words = "cannot be read \\(No such file" if how == "removed" else "was changed while it was in use; start again"
    with pytest.raises(DataError, match=rf"a\.{which}\.npy: {words}"):
        getattr(tokens, which)[0:2]
    if how != "removed":  # who opens it now has the one of now, also in the same process
        np.testing.assert_array_equal(getattr(open_token_file(path, "uint16"), which)[0:2], other[:2])


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path, "a.bin", bytes(80))
    array, read = open_token_file(path, "uint16"), token_files._read

    def read_when_cut(*arguments):
        os.truncate(path, 8)
        return read(*arguments)

    monkeypatch.setattr(token_files, "_read", read_when_cut)
    with pytest.raises(DataError, match=r"a\.bin: became shorter"):
        array[0:40]


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.7])
def test_many_small_files_and_one_large_one_give_the_same_share(fraction):
    small = {epath.Path(f"/d/{number}/a"): np.zeros(20_000) for number in range(50)}
    large = {epath.Path("/d/a"): np.zeros(1_000_000)}
    for arrays in (small, large):
        names = tuple(str(path.relative_to("/d")) for path in arrays)
        share = sum(extent.stop - extent.start for extent in split_extents(arrays, names, fraction).held_out)
        assert share / 1e6 == pytest.approx(fraction, abs=0.06)
