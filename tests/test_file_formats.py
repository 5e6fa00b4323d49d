"""What a file is called by its first bytes, and that text and token ids are called nothing."""

import numpy as np
import pytest
from foreign_files import FOREIGN, PACKED, POINTER

from hybridnorm_jax.file_formats import START_BYTES, encoding_of_text, format_of, pointer_of_git_lfs


@pytest.mark.parametrize("name", FOREIGN | PACKED)
def test_a_format_is_called_by_its_name(name):
    content, words = (FOREIGN | PACKED)[name]
    assert words in format_of(content[:START_BYTES]).name


@pytest.mark.parametrize("text", ["", "PAR1 is a receptor.\n" * 9, "ARROW1", "BZh is no word", "PK", "LZIP", "Obj"])
def test_a_text_may_begin_like_a_format(text):
    assert format_of(text.encode()) is None


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [
        pytest.param("<u2", 257, marks=pytest.mark.long),
        pytest.param("<u2", 50_257, marks=pytest.mark.long),
        ("<u2", 65_536),  # every pair of bytes
        ("<u4", 150_000),  # whose last byte is always 0
    ],
)
def test_token_ids_are_of_no_format_and_no_text(dtype, vocabulary):
    """A million beginnings; the rarest magic number, three bytes, would be hit by 0.06 of them."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (10_000, 100)).astype(dtype)
    content = ids.tobytes()
    step = ids.itemsize
    wrong = [place for place in range(0, len(content), step) if format_of(content[place : place + 300])]
    assert len(wrong) <= 1
    rows = [row.tobytes() for row in ids]
    assert [row for row in rows if encoding_of_text(row)] == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["plain words\n", "größer, 漢字 und 😀\r\n\t", "на русском "])
def test_text_is_known_in_its_encoding(text, encoding):
    content = (text * 100).encode(encoding)[:START_BYTES]
    assert encoding_of_text(content) == encoding.removesuffix("-sig").upper()


@pytest.mark.parametrize("content", [b"", b"a\x00b", b"\xff\xfea", b"caf\xe9 text", b"\x01"])
def test_what_is_no_text_has_no_encoding(content):
    assert encoding_of_text(content) is None


@pytest.mark.parametrize(("path", "directory"), [("a.txt", "."), ("/data/a.txt", "/data"), ("gs://b/a", "gs://b")])
def test_a_pointer_of_git_lfs_says_where_to_fetch_the_file(path, directory):
    right = f"a pointer of git-lfs, not the file itself; run `git lfs pull` in {directory}"
    assert pointer_of_git_lfs(path, POINTER) == right
    assert pointer_of_git_lfs(path, b"version 2 of a text") is None
