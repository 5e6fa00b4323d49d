"""Which documents a set of files holds, and what is said of files that hold none."""

import gzip
import json
import socket
import sysconfig

import pytest
import zstandard

from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.text.blocks import held_out
from hybridnorm_jax.data.text.sources import find_files, stdlib_corpus, text_corpus


def texts(*patterns, text_field="text"):
    corpus = text_corpus("data.files", [str(pattern) for pattern in patterns], text_field)
    return [document.text for file in corpus.files for document in corpus.documents(file)]


def digests(*patterns):
    corpus = text_corpus("data.files", [str(pattern) for pattern in patterns], "text")
    return {document.text: document.digest for file in corpus.files for document in corpus.documents(file)}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_text_file_is_one_document_packed_or_not(tmp_path, suffix):
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix]("zwei Zeilen,\n grün\n".encode()))
    assert texts(tmp_path / f"a.txt{suffix}") == ["zwei Zeilen,\n grün\n"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_jsonl_line_is_one_document_packed_or_not(tmp_path, suffix):
    data = lines({"text": "one"}, {"text": "two\nlines ä", "id": 7}, {"text": ""}) + b'\n{"text": "no newline"}'
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACKERS[suffix](data))
    assert texts(tmp_path / f"a.jsonl{suffix}") == ["one", "two\nlines ä", "no newline"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_members_written_one_after_the_other_are_all_read(tmp_path, suffix):
    pack = PACKERS[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"first, ") + pack(b"second"))
    assert texts(tmp_path / f"a.txt{suffix}") == ["first, second"]


def test_a_line_longer_than_a_chunk_is_whole(tmp_path):
    long = "x" * (3 << 20)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": long}, {"text": "short"}))
    assert texts(tmp_path / "a.jsonl") == [long, "short"]


def test_another_field_can_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"content": "here", "text": "not here"}))
    assert texts(tmp_path / "a.jsonl", text_field="content") == ["here"]


def test_patterns_find_every_file_once_and_no_directory(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "[x].txt", "deep/er/c.txt"):
        (tmp_path / name).write_text(name)
    found = find_files("data.files", [f"{tmp_path}/b.txt", f"{tmp_path}/**", f"{tmp_path}/[x].txt"])
    assert [path.name for path in found] == ["b.txt", "[x].txt", "a.txt", "c.txt"]


def test_a_documents_fate_survives_moving_renaming_and_reordering(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / "a.jsonl").write_bytes(lines({"text": "one"}, {"text": "two"}))
    (tmp_path / "new" / "z.jsonl").write_bytes(lines({"text": "two"}, {"text": "three"}, {"text": "one"}))
    old, new = digests(tmp_path / "old" / "*"), digests(tmp_path / "new" / "*")
    assert old["one"] == new["one"]
    assert old["two"] == new["two"]
    assert len(set(new.values())) == 3


def test_the_held_out_share_is_the_fraction():
    held = [held_out(number.to_bytes(8, "big"), 0.25) for number in range(0, 2**64, 2**54)]
    assert sum(held) == len(held) // 4
    assert not held_out(bytes(8), 0.0)
    assert held_out(b"\xff" * 8, 1.0)


def test_the_standard_library_is_its_own_sources_only():
    corpus = stdlib_corpus()
    names = [file.identity for file in corpus.files]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in names if skipped & set(name.split("/"))]
    assert len(set(names)) == len(names)
    assert names == [file.identity for file in stdlib_corpus().files]


def test_the_standard_librarys_subjects_are_mixed():
    names = [file.identity for file in stdlib_corpus().files]
    asyncio = [index / len(names) for index, name in enumerate(names) if name.startswith("asyncio/")]
    assert min(asyncio) < 0.25
    assert max(asyncio) > 0.75


def test_an_identity_in_the_standard_library_is_the_relative_path(tmp_path, monkeypatch):
    def digest(directory, content):
        directory.mkdir()
        (directory / "module.py").write_text(content)
        (directory / "empty.py").write_text("")
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(directory))
        corpus = stdlib_corpus()
        (document,) = [document for file in corpus.files for document in corpus.documents(file)]
        return document.digest

    assert digest(tmp_path / "3.11", "x = 1") == digest(tmp_path / "3.12", "x = 2")


def test_a_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"data\.source=stdlib") as error:
        stdlib_corpus()
    assert str(tmp_path) in one_line(error)


BAD_FILES = {
    "empty.txt": (b"", ["holds no text"]),
    "blank.txt": (b" \n\n", ["holds no text"]),
    "empty.jsonl": (lines({"text": ""}), ["holds no text"]),
    "latin.txt": ("grün".encode("latin-1"), ["invalid UTF-8", "byte 2"]),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "gr\xfcn"}\n', ["invalid UTF-8", "byte 26"]),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', ["bad.jsonl:3", "not JSON"]),
    "other.jsonl": (lines({"text": "a"}, {"body": "b"}), ["other.jsonl:2", "'text'", "data.text_field", "body"]),
    "list.jsonl": (b"[1]\n", ["list.jsonl:1", "data.text_field"]),
    "number.jsonl": (lines({"text": 3}), ["number.jsonl:1", "data.text_field", "string, not a number"]),
    "half.jsonl": (b'{"text": "\\ud800"}\n', ["half.jsonl:1", "surrogate"]),
    "cut.txt.gz": (gzip.compress(bytes(range(256)))[:-12], ["damaged or truncated"]),
    "cut.txt.zst": (zstandard.ZstdCompressor().compress(b"hello " * 1000)[:-3], ["damaged or truncated"]),
    "not.txt.gz": (b"plain text", ["damaged or truncated"]),
    "not.txt.zst": (b"plain text", ["damaged or truncated"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_place(tmp_path, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        texts(tmp_path / name)
    message = one_line(error)
    assert str(tmp_path / name) in message
    for word in words:
        assert word in message


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    # A socket: nobody can open it as a file, the superuser included.
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as unreadable:
        unreadable.bind("socket.txt")
        with pytest.raises(DataError, match=r"socket\.txt: no regular file") as error:
            texts("socket.txt")
    one_line(error)


@pytest.mark.parametrize("pattern", ["missing.txt", "*.nothing"])
def test_a_name_without_a_file_is_an_error(tmp_path, pattern):
    with pytest.raises(DataError, match=r"data\.files: no such file") as error:
        texts(tmp_path / pattern)
    assert pattern in one_line(error)


def test_a_directory_is_an_error_that_shows_what_to_write(tmp_path):
    with pytest.raises(DataError, match=r"data\.files: .* is a directory") as error:
        texts(tmp_path)
    assert str(tmp_path / "*.txt") in one_line(error)
