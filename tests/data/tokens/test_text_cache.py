"""The cache of tokenized text: whole or not at all, rebuilt exactly when its inputs change."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from hybridnorm_jax.data import DataError
from hybridnorm_jax.data.text.sources import text_corpus
from hybridnorm_jax.data.tokens.document_ends import document_ends
from hybridnorm_jax.data.tokens.text_cache import open_text_cache
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer

WORDS = [f"document number {number} ä" for number in range(60)]


class CountingTokenizer(ByteTokenizer):
    """Bytes, counting the documents it was given."""

    def __init__(self):
        self.documents = 0

    def encode_batch(self, texts):
        self.documents += len(texts)
        return super().encode_batch(texts)


@pytest.fixture
def files(tmp_path):
    for part in range(3):
        records = [json.dumps({"text": word, "body": f"other {word}"}) for word in WORDS[20 * part : 20 * (part + 1)]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(records))
    return tmp_path / "*.jsonl"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def build(files, root, tokenizer=None, text_field="text", fraction=0.3):
    """(the cache, how many documents were tokenized for it)."""
    tokenizer = tokenizer or CountingTokenizer()
    before = tokenizer.documents
    corpus = text_corpus("data.files", [str(files)], text_field)
    cache = open_text_cache(corpus, tokenizer, fraction=fraction, cache_dir=str(root), progress=False)
    return cache, tokenizer.documents - before


def documents(cache, split):
    stream = cache.stream([split], 257)
    ids = stream.read(0, len(stream)) if len(stream) else np.zeros(0, np.int32)
    assert not len(ids) or ids[-1] == 256
    pieces = np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]
    return [bytes(piece[:-1].tolist()).decode() for piece in pieces]


def test_every_document_is_in_exactly_one_split(files, root):
    cache, _ = build(files, root)
    train, validation = documents(cache, "train"), documents(cache, "validation")
    assert sorted(train + validation) == sorted(WORDS)
    assert 5 < len(validation) < 35
    assert train == sorted(train, key=WORDS.index)  # in the order of the files


@pytest.mark.parametrize("batch", [100, 1 << 19])
def test_the_index_of_document_ends_is_where_the_separators_are(files, root, monkeypatch, batch):
    monkeypatch.setattr("hybridnorm_jax.data.tokens.token_workers.BATCH_CHARACTERS", batch)
    cache, _ = build(files, root)
    for split in ("train", "validation"):
        tokens = np.load(cache.path / f"{split}-00000.npy")
        ends = np.load(cache.path / f"{split}-00000.ends.npy")
        assert ends.dtype == np.uint64
        np.testing.assert_array_equal(ends, np.flatnonzero(tokens == 256) + 1)
        path = cache.path / f"{split}-00000.npy"
        np.testing.assert_array_equal(document_ends(path, len(tokens)), ends)
        with pytest.raises(DataError, match=rf"{split}-00000\.ends\.npy: no index"):
            np.asarray(document_ends(path, len(tokens) + 1))


def test_a_larger_fraction_only_adds_to_the_held_out_documents(files, root):
    small, large = (set(documents(build(files, root, fraction=f)[0], "validation")) for f in (0.2, 0.4))
    assert small < large
    assert documents(build(files, root, fraction=0.0)[0], "validation") == []
    assert documents(build(files, root, fraction=1.0)[0], "train") == []


def test_the_counts_are_those_of_the_text(files, root):
    cache, _ = build(files, root)
    for split, counts in cache.manifest.splits.items():
        texts = documents(cache, split)
        assert counts.pieces == len(texts)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert counts.tokens == counts.bytes + counts.pieces == len(cache.stream([split], 257))
    assert cache.manifest.documents == len(WORDS)
    assert cache.manifest.max_id == 256


def test_a_large_vocabulary_is_stored_in_more_bits(files, root):
    class Shifted(CountingTokenizer):
        vocab_size = separator_id = 100_000
        fingerprint = "shifted"

        def encode_batch(self, texts):
            return [ids.astype(np.int32) + 70_000 for ids in super().encode_batch(texts)]

    cache, _ = build(files, root, Shifted())
    stream = cache.stream(["train"], 100_001)
    assert np.load(cache.path / "train-00000.npy", mmap_mode="r").dtype == np.uint32
    assert cache.manifest.max_id == 100_000
    assert stream.read(0, 8).tolist() == [70_000 + byte for byte in b"document"]
    small, _ = build(files, root)
    assert np.load(small.path / "train-00000.npy", mmap_mode="r").dtype == np.uint16


def test_nothing_is_tokenized_twice(files, root):
    assert build(files, root)[1] == len(WORDS)
    assert build(files, root)[1] == 0


def test_a_touched_added_or_changed_file_is_tokenized_again(files, root):
    build(files, root)
    path = files.parent / "1.jsonl"
    os.utime(path, ns=(0, 1))
    assert build(files, root)[1] == len(WORDS)
    path.write_text(path.read_text() + '\n{"text": "one more"}')
    assert build(files, root)[1] == len(WORDS) + 1
    (files.parent / "3.jsonl").write_text('{"text": "another"}')
    cache, tokenized = build(files, root)
    assert tokenized == len(WORDS) + 2
    assert {"one more", "another"} <= {*documents(cache, "train"), *documents(cache, "validation")}


def test_a_file_changed_with_an_equal_size_and_time_is_tokenized_again(files, root):
    build(files, root)
    path = files.parent / "1.jsonl"
    time = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("number 25", "NUMBER 25"))
    os.utime(path, ns=(time, time))
    cache, tokenized = build(files, root)
    assert tokenized == len(WORDS)
    assert "document NUMBER 25 ä" in documents(cache, "train") + documents(cache, "validation")


def test_other_settings_get_another_cache_and_leave_the_first(files, root):
    class Renamed(CountingTokenizer):
        fingerprint = "another tokenizer"

    build(files, root)
    assert build(files, root, Renamed())[1] == len(WORDS)
    assert build(files, root, text_field="body", fraction=0.0)[1] == len(WORDS)
    assert build(files, root, fraction=0.5)[1] == len(WORDS)
    assert build(files, root)[1] == 0


def damage_missing(directory):
    (directory / "train-00000.npy").unlink()


def damage_cut(directory):
    os.truncate(directory / "validation-00000.npy", 140)


def damage_meta(directory):
    (directory / "manifest.json").write_text('{"splits"')


def damage_no_meta(directory):
    (directory / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [damage_missing, damage_cut, damage_meta, damage_no_meta])
def test_a_damaged_cache_is_rebuilt_and_said_so(files, root, capsys, damage):
    cache, _ = build(files, root)
    expected = documents(cache, "train")
    damage(cache.path)
    capsys.readouterr()
    again, tokenized = build(files, root)
    assert tokenized == len(WORDS)
    assert documents(again, "train") == expected
    assert capsys.readouterr().err.count(f"{cache.path}: damaged cache") == 1
    assert build(files, root)[1] == 0


def test_what_a_dead_process_left_is_removed_and_a_living_ones_kept(files, root):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    cache, _ = build(files, root)
    shutil.rmtree(cache.path)
    host = socket.gethostname()
    names = {
        f"{cache.path.name}.{host}.{dead.pid}.partial": False,
        f"{cache.path.name}.{host}.{os.getpid()}.partial": False,
        f"{cache.path.name}.{host}.{os.getppid()}.partial": True,
        f"{cache.path.name}.another.{host}.{dead.pid}.partial": True,
    }
    for name in names:
        (root / name).mkdir()
        (root / name / "train-00000.npy").write_bytes(b"half of it")
    again, tokenized = build(files, root)
    assert tokenized == len(WORDS)
    assert sorted(documents(again, "train") + documents(again, "validation")) == sorted(WORDS)
    assert {name: (root / name).exists() for name in names} == names


def test_of_two_writers_the_second_keeps_the_firsts(files, root, monkeypatch):
    rename = os.rename

    def rename_late(partial, directory):
        shutil.copytree(partial, directory)
        (directory / "first").touch()
        rename(partial, directory)

    monkeypatch.setattr(os, "rename", rename_late)
    cache, _ = build(files, root)
    assert (cache.path / "first").exists()
    assert list(root.iterdir()) == [cache.path]
    assert sorted(documents(cache, "train") + documents(cache, "validation")) == sorted(WORDS)


def test_bad_text_leaves_nothing_and_loses_nothing(files, root):
    first, _ = build(files, root)
    (files.parent / "3.jsonl").write_text("no json")
    with pytest.raises(DataError, match=r"3\.jsonl:1"):
        build(files, root)
    assert list(root.iterdir()) == [first.path]


def test_a_full_disk_is_an_error_and_leaves_nothing(files, root, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="no space left") as error:
        build(files, root)
    assert str(error.value).startswith(f"data.cache_dir={root}: ")
    assert list(root.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(files, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*taken"):
        build(files, tmp_path / "taken" / "cache")
    with pytest.raises(DataError, match=r"data\.cache_dir=gs://bucket: .*local"):
        build(files, "gs://bucket")


def test_a_progress_bar_counts_files_and_tokens(files, root, capsys, monkeypatch):
    monkeypatch.setattr("hybridnorm_jax.data.tokens.tokenizing_display.can_redraw", lambda stream: True)
    monkeypatch.setattr("hybridnorm_jax.data.tokens.token_workers.BATCH_CHARACTERS", 100)
    corpus = text_corpus("data.files", [str(files)], "text")
    open_text_cache(corpus, ByteTokenizer(), fraction=0.3, cache_dir=str(root), progress=True)
    shown = capsys.readouterr().err
    assert "/3" in shown
    assert "tokens" in shown
    build(files, root, fraction=0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()  # standard error is no terminal here
    open_text_cache(corpus, ByteTokenizer(), fraction=0.2, cache_dir=str(root), progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("hybridnorm_jax.data.tokens.tokenizing_display.QUIET_SECONDS", 0.0)
    open_text_cache(corpus, ByteTokenizer(), fraction=0.4, cache_dir=str(root), progress=True)
    assert capsys.readouterr().err == "tokenizing 3 text files\n"
