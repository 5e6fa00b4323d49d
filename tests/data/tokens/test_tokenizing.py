"""Tokens that are made ahead: the same files from any number of processes, and after any number of kills."""

import collections
import json
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from processes import REPOSITORY

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.mixture_section import SourceSection
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.text.sources import text_corpus
from hybridnorm_jax.data.tokens import token_workers, tokenizing
from hybridnorm_jax.data.tokens.token_workers import Processes, ThisProcess
from hybridnorm_jax.data.tokens.tokenized_directory import open_tokenized
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer, load_tokenizer
from hybridnorm_jax.data.tokens.tokenizing import Job, write_tokens

SHARD = 4000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer.json with merges, and with a separator that texts may spell out."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["one document of words and another document"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(DataSection(tokenizer=str(path)))


def text_of(length, seed):
    rng = random.Random(seed)
    words = ["one", "document", "of", "wörds", "another", "\n", "  ", "<|endoftext|>", "日本"]
    return " ".join(rng.choice(words) for _ in range(length))


@pytest.fixture
def corpus(tmp_path):
    """Records, a long text file in blocks, and a packed file, with a document that comes three times."""
    records = [json.dumps({"text": text_of(1 + 7 * number % 90, number)}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*records[:100], records[3], *records[100:]]))
    (tmp_path / "b.txt").write_text(text_of(9000, 1000))
    (tmp_path / "c.jsonl").write_text(records[7] + "\n" + json.dumps({"text": "the last one"}))
    return text_corpus("FILE", [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl")], "text")


def write(directory, job, workers):
    directory.mkdir()
    return write_tokens(directory, job, workers, shown=False)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def documents(directory, separator):
    """Every document's ids, of both splits."""
    manifest = open_tokenized(directory).manifest
    found = []
    for shards in manifest.shards.values():
        for shard in shards:
            tokens = np.load(directory / shard.file.name)
            ends = np.load(directory / shard.ends.name)
            assert len(ends) == shard.pieces
            assert len(tokens) == shard.tokens
            np.testing.assert_array_equal(ends, np.flatnonzero(tokens == separator) + 1)
            found += [piece[:-1] for piece in np.split(tokens, ends.astype(int))[:-1]]
    return found


@pytest.mark.parametrize("drops", [False, True])
def test_the_files_do_not_depend_on_who_tokenizes(corpus, tokenizer, tmp_path, monkeypatch, drops):
    monkeypatch.setattr(tokenizing, "LONG_CHARACTERS", 3000)
    job = Job(corpus, tokenizer, 0.1, drops_duplicates=drops, shard_tokens=SHARD)
    write(tmp_path / "here", job, ThisProcess(tokenizer))
    expected = contents(tmp_path / "here")
    assert len(expected) > 8  # several shards
    for number, size in ((1, 700), (3, 50)):
        monkeypatch.setattr(token_workers, "PROCESS_BATCH_CHARACTERS", size)
        with Processes(tokenizer, "", number) as processes:
            write(tmp_path / str(number), job, processes)
        assert contents(tmp_path / str(number)) == expected


@pytest.mark.parametrize("long", [37, 1 << 18])
def test_every_document_is_there_once_and_decodes_to_its_text(corpus, tmp_path, monkeypatch, long):
    monkeypatch.setattr(tokenizing, "LONG_CHARACTERS", long)
    job = Job(corpus, ByteTokenizer(), 0.0, shard_tokens=SHARD)
    manifest = write(tmp_path / "out", job, ThisProcess(ByteTokenizer()))
    texts = [document.text for file in corpus.files for document in corpus.documents(file)]
    found = [bytes(ids.tolist()).decode() for ids in documents(tmp_path / "out", 256)]
    assert found == texts
    assert manifest.documents == len(texts)
    assert manifest.splits["train"].bytes == sum(len(text.encode()) for text in texts)
    assert manifest.splits["train"].words == sum(len(text.split()) for text in texts)
    assert manifest.max_id == 256
    lengths = [shard.tokens for shard in manifest.shards["train"]]
    assert all(length >= SHARD for length in lengths[:-1])


def test_a_document_whose_text_came_before_is_dropped_and_counted(corpus, tmp_path):
    job = Job(corpus, ByteTokenizer(), 0.0, drops_duplicates=True)
    manifest = write(tmp_path / "out", job, ThisProcess(ByteTokenizer()))
    found = [bytes(ids.tolist()).decode() for ids in documents(tmp_path / "out", 256)]
    texts = [document.text for file in corpus.files for document in corpus.documents(file)]
    assert found == list(dict.fromkeys(texts))
    assert manifest.duplicates == len(texts) - len(found) == 2
    assert manifest.documents == len(found)


def test_a_text_file_that_is_read_in_blocks_is_a_duplicate_as_a_whole(tmp_path, monkeypatch):
    lines = "".join(f"line {number}\n" for number in range(1000))
    for name, text in (("a.txt", lines), ("b.txt", lines), ("c.txt", lines + "one more\n")):
        (tmp_path / name).write_text(text)
    corpus = text_corpus("FILE", [str(tmp_path / "*.txt")], "text")
    assert not corpus.holds_whole_files_out(0.1)
    job = Job(corpus, ByteTokenizer(), 0.1, drops_duplicates=True)
    manifest = write(tmp_path / "out", job, ThisProcess(ByteTokenizer()))
    assert (manifest.documents, manifest.duplicates) == (2, 1)
    assert sum(counts.bytes for counts in manifest.splits.values()) == 2 * len(lines) + len("one more\n")


KILLED = """
    import os, pathlib, random, signal, sys, time
    from hybridnorm_jax.data.tokens import token_workers, tokenizing
    from hybridnorm_jax.data.text.sources import text_corpus
    from hybridnorm_jax.data.tokens.token_workers import ThisProcess
    from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer

    folder, out, seed = sys.argv[1:]
    tokenizing.SAVE_SECONDS = 0.0
    tokenizing.LONG_CHARACTERS = 3000
    token_workers.BATCH_CHARACTERS = 600
    corpus = text_corpus("FILE", [f"{folder}/{name}" for name in ("a.jsonl", "b.txt", "c.jsonl")], "text")
    job = tokenizing.Job(corpus, ByteTokenizer(), 0.1, drops_duplicates=True, shard_tokens=4000)
    rng = random.Random(int(seed))
    pathlib.Path(out).mkdir()
    kills = 0
    while kills < 20:
        process = os.fork()
        if not process:
            tokenizing.write_tokens(pathlib.Path(out), job, ThisProcess(ByteTokenizer()), shown=False)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if status == 0:
            # It was whole before the kill: begin again, so that all of the 20 hit somewhere.
            for path in pathlib.Path(out).iterdir():
                path.unlink()
        else:
            kills += 1
    tokenizing.write_tokens(pathlib.Path(out), job, ThisProcess(ByteTokenizer()), shown=False)
"""


def test_twenty_kills_at_random_moments_give_the_same_files(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "LONG_CHARACTERS", 3000)
    job = Job(corpus, ByteTokenizer(), 0.1, drops_duplicates=True, shard_tokens=SHARD)
    write(tmp_path / "whole", job, ThisProcess(ByteTokenizer()))
    script = textwrap.dedent(KILLED)
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "killed"), "0"]
    subprocess.run(command, check=True, cwd=REPOSITORY, timeout=100)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


class _StopsAfter(ThisProcess):
    """Fails after so many batches, as a full disk or a kill would."""

    def __init__(self, tokenizer, count):
        super().__init__(tokenizer)
        self.left = count
        self.asked = []

    def batch(self, texts, size):
        self.left -= 1
        if self.left < 0:
            raise OSError("stopped here")
        self.asked += texts
        return super().batch(texts, size)


@pytest.mark.parametrize("count", [0, 3, 9])
def test_what_was_written_is_not_tokenized_again(corpus, tmp_path, monkeypatch, count):
    monkeypatch.setattr(tokenizing, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(token_workers, "BATCH_CHARACTERS", 3000)
    job = Job(corpus, ByteTokenizer(), 0.1, drops_duplicates=True, shard_tokens=SHARD)
    whole = _StopsAfter(ByteTokenizer(), 10**6)
    write(tmp_path / "whole", job, whole)
    first = _StopsAfter(ByteTokenizer(), count)
    with pytest.raises(OSError, match="stopped here"):
        write(tmp_path / "out", job, first)
    second = _StopsAfter(ByteTokenizer(), 10**6)
    write_tokens(tmp_path / "out", job, second, shown=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    texts = collections.Counter("".join(parts) for parts in [*first.asked, *second.asked])
    assert texts == collections.Counter("".join(parts) for parts in whole.asked)


def test_a_directory_that_was_begun_is_refused_until_it_is_whole_and_with_other_inputs(corpus, tmp_path):
    job = Job(corpus, ByteTokenizer(), 0.1)
    with pytest.raises(OSError, match="stopped"):
        write(tmp_path / "out", job, _StopsAfter(ByteTokenizer(), 0))
    section = DataSection(source="tokens", files=(str(tmp_path / "out"),), validation_fraction=0.1)
    goes_on = r"`hybridnorm tokenize` with the same arguments goes on, unless its text has changed: then remove the"
    with pytest.raises(DataError, match=f"is not whole: it was stopped while it was written; {goes_on}"):
        open_data(section, seq_len=8, vocab_size=257)
    other = Job(corpus, ByteTokenizer(), 0.2)
    with pytest.raises(DataError, match=r"was made, or begun, with other inputs \(fraction differ\)"):
        write_tokens(tmp_path / "out", other, ThisProcess(ByteTokenizer()), shown=False)
    write_tokens(tmp_path / "out", job, ThisProcess(ByteTokenizer()), shown=False)
    open_data(section, seq_len=8, vocab_size=257)


def test_a_file_that_changes_while_it_is_read_is_said(corpus, tmp_path):
    class Appends(ThisProcess):
        def batch(self, texts, size):
            with open(tmp_path / "c.jsonl", "a") as stream:
                stream.write('\n{"text": "another one"}')
            return super().batch(texts, size)

    with pytest.raises(DataError, match="a file was changed while it was read"):
        write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), Appends(ByteTokenizer()))


def test_two_processes_do_not_write_one_directory(corpus, tmp_path):
    class Second(ThisProcess):
        def batch(self, texts, size):
            write_tokens(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), self, shown=False)

    with pytest.raises(DataError, match="another process is writing there"):
        write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), Second(ByteTokenizer()))


def section_of(tmp_path, **settings):
    base = {"source": "tokens", "files": (str(tmp_path / "out"),), "validation_fraction": 0.1}
    return DataSection(**(base | settings))


def rows(windows):
    return [{name: values.tolist() for name, values in windows[index].items()} for index in range(len(windows))]


@pytest.mark.parametrize("segment_ids", [False, True])
def test_a_run_reads_the_same_windows_as_of_the_text_itself(corpus, tmp_path, segment_ids):
    write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), ThisProcess(ByteTokenizer()))
    files = tuple(str(file.path) for file in corpus.files)
    text = {"source": "text", "files": files, "cache_dir": str(tmp_path / "cache")}
    settings = {"segment_ids": segment_ids}
    sections = [section_of(tmp_path, **settings), section_of(tmp_path, **text, **settings)]
    tokens, of_text = (open_data(section, seq_len=50, vocab_size=257) for section in sections)
    assert rows(tokens.train) == rows(of_text.train)
    assert rows(tokens.validation["validation"]) == rows(of_text.validation["validation"])
    for windows in (lambda data: data.train, lambda data: data.validation["validation"]):
        mine, other = windows(tokens), windows(of_text)
        assert mine.bytes_per_token == other.bytes_per_token
        assert mine.words_per_token == other.words_per_token
    assert tokens.tokenizer.name == "bytes"


def test_a_directory_can_be_trained_on_whole_or_be_a_validation_set(corpus, tmp_path):
    manifest = write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), ThisProcess(ByteTokenizer()))
    total = sum(counts.tokens for counts in manifest.splits.values())
    sets = {"train_all": (str(tmp_path / "out"),)}
    data = open_data(section_of(tmp_path, validation_fraction=0.0, validation=sets), seq_len=50, vocab_size=257)
    assert data.train.num_tokens == total
    assert data.validation["train_all"].num_tokens == total


@pytest.mark.parametrize(
    ("settings", "vocab_size", "message"),
    [
        ({"validation_fraction": 0.2}, 257, r"data\.validation_fraction=0\.2: .*out was made with 0\.1"),
        ({"separator_id": 3}, 257, r"data\.separator_id=3: 256 ends the documents"),
        ({}, 256, r"its largest id 256 does not fit model\.vocab_size=256; set model\.vocab_size to at least 257"),
    ],
)
def test_what_does_not_belong_to_the_tokens_is_refused(corpus, tmp_path, settings, vocab_size, message):
    write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), ThisProcess(ByteTokenizer()))
    with pytest.raises(DataError, match=message):
        open_data(section_of(tmp_path, **settings), seq_len=8, vocab_size=vocab_size)


def test_another_tokenizer_and_other_directories_are_refused(corpus, tokenizer, tmp_path):
    write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), ThisProcess(ByteTokenizer()))
    with pytest.raises(DataError, match=r"data\.tokenizer=.*the tokens of .*out were made by another one, bytes"):
        open_data(section_of(tmp_path, tokenizer=tokenizer.name), seq_len=8, vocab_size=300)
    write(tmp_path / "two", Job(corpus, tokenizer, 0.1), ThisProcess(tokenizer))
    both = (str(tmp_path / "out"), str(tmp_path / "two"))
    with pytest.raises(DataError, match="ids of two tokenizers have nothing in common"):
        open_data(section_of(tmp_path, files=both), seq_len=8, vocab_size=300)
    # Also where they are different sources, or one is a validation set; in either order.
    for first, second in (both, both[::-1]):
        parts = {name: SourceSection(files=(path,)) for name, path in (("a", first), ("b", second))}
        for named in (
            {"mixture": parts, "files": (), "source": "stdlib"},
            {"files": (first,), "validation": {"b": (second,)}},
        ):
            section = section_of(tmp_path, **{"validation_fraction": 0.0} | named)
            with pytest.raises(DataError, match=r"^data\.\w+\.b\S*: .* ids of two tokenizers have nothing in common$"):
                open_data(section, seq_len=8, vocab_size=300)
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(DataError, match="name directories only, or files only"):
        open_data(section_of(tmp_path, files=(both[0], str(tmp_path / "ids.npy"))), seq_len=8, vocab_size=300)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is a directory; name its files"):
        open_data(section_of(tmp_path, files=(str(tmp_path / "empty"),)), seq_len=8, vocab_size=300)


def damage_missing(path):
    path.unlink()


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def damage_changed(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train-00000.npy", "validation-00000.ends.npy"])
@pytest.mark.parametrize("damage", [damage_missing, damage_cut, damage_changed])
def test_a_damaged_file_is_named(corpus, tmp_path, damage, name):
    write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), ThisProcess(ByteTokenizer()))
    damage(tmp_path / "out" / name)
    with pytest.raises(DataError, match=name):
        open_data(section_of(tmp_path), seq_len=8, vocab_size=257)


def test_a_damaged_manifest_is_named(corpus, tmp_path):
    write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.1), ThisProcess(ByteTokenizer()))
    whole = (tmp_path / "out" / "manifest.json").read_text()
    for content in (whole[:100], "{}", "[]", whole.replace('"format": 1', '"format": 9'), ""):
        (tmp_path / "out" / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
            open_data(section_of(tmp_path), seq_len=8, vocab_size=257)


def test_of_few_documents_one_is_held_out_as_in_a_run(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {number}"}) for number in range(4)))
    corpus = text_corpus("FILE", [str(tmp_path / "a.jsonl")], "text")
    manifest = write(tmp_path / "out", Job(corpus, ByteTokenizer(), 0.001), ThisProcess(ByteTokenizer()))
    assert (manifest.splits["train"].pieces, manifest.splits["validation"].pieces) == (3, 1)
    assert not manifest.is_split_by_hash
