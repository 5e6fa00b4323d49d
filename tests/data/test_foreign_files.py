"""What is said where a file of another format is given as text or as token ids."""

import gzip

import numpy as np
import pytest
from etils import epath
from foreign_files import FOREIGN, PACKED, POINTER, TEXT, tar

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, load_tokenizer, open_data
from hybridnorm_jax.data.text.sources import text_corpus
from hybridnorm_jax.data.tokens.token_files import open_token_file


def texts(path) -> list[str]:
    corpus = text_corpus("data.files", [str(path)], "text")
    return [document.text for file in corpus.files for document in corpus.documents(file)]


def refused(read, *arguments) -> str:
    with pytest.raises(DataError) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tar"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_format_is_no_text(tmp_path, kind, name):
    content, words = FOREIGN[kind]
    if name == "a.tar" and kind == "tar":
        pytest.skip("it is what its name says, and read")
    (tmp_path / name).write_bytes(content)
    message = refused(texts, tmp_path / name)
    assert f"{tmp_path / name}: " in message
    assert words in message
    assert "UTF-8" not in message


@pytest.mark.parametrize(
    ("name", "pack"), [("t.txt", bytes), ("t.txt.gz", gzip.compress), ("j.jsonl.gz", gzip.compress)]
)
def test_a_tar_archive_that_is_called_text_is_not_trained_on(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(tar()))
    right = f"{path}: a tar archive; give it a name that ends in .tar, and it is read as what it is"
    assert refused(texts, path) == right
    (tmp_path / "good.txt").write_bytes(TEXT)
    section = DataSection(
        source="text",
        files=(str(tmp_path / "good.txt"),),
        validation={"v": (str(path),)},
        cache_dir=str(tmp_path / "cache"),
    )
    assert refused(lambda: open_data(section, seq_len=8, vocab_size=257, progress=False)) == right


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_twice_is_called_so(tmp_path, kind):
    content, words = PACKED[kind]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    message = refused(texts, tmp_path / "a.txt.gz")
    assert "packed twice" in message
    assert words in message


def test_a_text_whose_first_word_is_a_magic_number_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("PAR1 is a receptor.\n")
    assert texts(tmp_path / "a.txt") == ["PAR1 is a receptor.\n"]


def test_bytes_that_are_no_text_are_not_to_be_converted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(1, 256)))
    message = refused(texts, tmp_path / "a.txt")
    assert "invalid UTF-8 at byte 0; it also holds control characters" in message
    assert "convert" not in message


@pytest.mark.parametrize("place", [5, 3_000_000])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_zero_byte_is_no_text(tmp_path, name, place):
    line = b'{"text": "some text"}\n' if name == "a.jsonl" else b"some text\n"
    content = line * (place // len(line) + 1)
    (tmp_path / name).write_bytes(content + b"\0" + line)
    assert f"a zero byte at byte {len(content)}; " in refused(texts, tmp_path / name)


def test_a_record_may_spell_a_zero(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a\0b"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.jsonl.gz", "p.txt.zst", "p.txt.bz2", "p.xz"])
def test_a_pointer_of_git_lfs_is_no_text_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    right = f"a pointer of git-lfs, not the file itself; run `git lfs pull` in {tmp_path}"
    assert refused(texts, tmp_path / name) == f"{tmp_path / name}: {right}"


@pytest.mark.parametrize("content", [POINTER, FOREIGN["zip"][0]])
def test_a_tokenizer_that_is_another_file_is_called_so(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    section = DataSection(source="text", files=("x",), tokenizer=str(path))
    right = f"run `git lfs pull` in {tmp_path}" if content == POINTER else "a zip archive, not a tokenizer.json"
    message = refused(load_tokenizer, section)
    assert message.startswith(f"data.tokenizer={path}: ")
    assert right in message


def opened(path):
    return open_token_file(epath.Path(path), "uint16")


@pytest.mark.parametrize("name", ["i.npy", "i.bin", "i.npy.gzip", "i.npy.zstd", "i.bin.tgz", "ids"])
@pytest.mark.parametrize("kind", FOREIGN | PACKED)
def test_another_format_holds_no_token_ids(tmp_path, kind, name):
    content, words = (FOREIGN | PACKED)[kind]
    (tmp_path / name).write_bytes(content + b"\0" * (len(content) % 2))
    assert words in refused(opened, tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["The words of a text.\n", "Ein größeres Wort, 漢字.\n", "Только по-русски. "])
def test_text_is_no_token_ids_in_any_script(tmp_path, text, encoding):
    content = (text * 60).encode(encoding)
    (tmp_path / "a.bin").write_bytes(content + b" " * (len(content) % 2))
    message = refused(opened, tmp_path / "a.bin")
    assert "is text in UTF-" in message
    assert "set data.source=text" in message
    assert ("iconv" in message) == encoding.startswith(("utf-16", "utf-32"))


@pytest.mark.parametrize("text", ["[12, 345, 6]", "12,345;6\n", "\ufeff12\r\n345\r\n"])
def test_token_ids_that_are_spelled_are_no_text_to_train_on(tmp_path, text):
    (tmp_path / "ids.txt").write_text(text * 400, encoding="utf-8")
    message = refused(opened, tmp_path / "ids.txt")
    assert "that spells token ids; read them, and write them with np.save" in message
    assert "data.source=text" not in message


def test_few_ids_may_be_those_of_characters(tmp_path):
    """Both bytes of 20 ids may be characters by chance."""
    ids = np.frombuffer(b"20 ids, as a sentence of 40 characters..", "<u2")
    ids.tofile(tmp_path / "a.bin")
    np.testing.assert_array_equal(opened(tmp_path / "a.bin")[:], ids)
