"""From data.* to windows: sources, splits, named sets, and what is refused."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data, opened_source
from hybridnorm_jax.data.text import blocks, text_files
from hybridnorm_jax.data.tokens import tokenizing
from hybridnorm_jax.errors import UserError

TEXTS = [f"This is text {number}. " * (number % 5 + 1) for number in range(50)]


@pytest.fixture
def text(tmp_path):
    """Makes a DataSection over 50 documents."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXTS))

    def section(**keys):
        base = {"source": "text", "files": (str(tmp_path / "*.jsonl"),), "cache_dir": str(tmp_path / "cache")}
        return DataSection(**{**base, "validation_fraction": 0.3, **keys})

    return section


def open_quietly(section, seq_len=16, vocab_size=257, **keys):
    return open_data(section, seq_len=seq_len, vocab_size=vocab_size, progress=False, **keys)


def scored(windows):
    """Every target of weight 1, in order."""
    return np.concatenate([row["targets"][row["weights"] > 0] for row in windows]).tolist()


def byte_tokenizer_json(path):
    """A tokenizer.json whose ids are byte-level characters, with <|endoftext|> as id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return tokenizer


def test_the_standard_library_is_there_on_every_machine(tmp_path):
    data = open_quietly(DataSection(cache_dir=str(tmp_path)), seq_len=256)
    assert data.train.num_tokens > 5_000_000
    assert len(data.train) == (data.train.num_tokens - 1) // 256
    assert 0.002 < data.validation["validation"].num_tokens / data.train.num_tokens < 0.06
    assert "def " in data.tokenizer.decode(np.concatenate([data.train[i]["tokens"] for i in range(400)]))
    for word in ("standard library", "documents", f"{data.train.num_tokens:,} tokens", "held out", str(tmp_path)):
        assert word in data.description
    assert "\n" not in data.description


def test_held_out_documents_and_training_documents_are_all_documents(text):
    data = open_quietly(text(), seq_len=1)
    assert list(data.validation) == ["validation"]
    pieces = [data.tokenizer.decode(scored(windows)) for windows in (data.train, data.validation["validation"])]
    assert sum(map(len, pieces)) == sum(map(len, TEXTS)) - 2  # the first token of each split is no target
    total = data.train.num_tokens + data.validation["validation"].num_tokens
    assert total == sum(map(len, TEXTS)) + len(TEXTS)


def test_every_held_out_token_is_scored_whatever_the_length(text):
    expected = scored(open_quietly(text(), seq_len=1).validation["validation"])
    assert len(expected) > 100
    assert scored(open_quietly(text(), seq_len=37).validation["validation"]) == expected


def test_bytes_per_token_counts_separators_as_tokens(text, tmp_path):
    (tmp_path / "two.txt").write_text("grün")
    windows = open_quietly(text(validation={"two": (str(tmp_path / "two.txt"),)})).validation["two"]
    assert windows.bytes_per_token == 5 / 6
    assert windows.words_per_token == 1 / 6


def test_words_are_what_whitespace_separates_in_both_splits_together(text):
    data = open_quietly(text(), seq_len=1)
    parts = [data.train, data.validation["validation"]]
    words = sum(part.words_per_token * part.num_tokens for part in parts)
    assert words == pytest.approx(sum(len(each.split()) for each in TEXTS))


def test_named_sets_are_read_whole_and_cached_too(text, tmp_path):
    (tmp_path / "news.txt").write_text("news of today")
    (tmp_path / "books.txt").write_text("a book")
    names = {"news": (str(tmp_path / "news.txt"),), "books": (str(tmp_path / "books*"),)}
    data = open_quietly(text(validation=names))
    assert set(data.validation) == {"validation", "news", "books"}
    assert data.tokenizer.decode(scored(data.validation["news"])) == "ews of today"
    assert set(open_quietly(text(validation=names, validation_fraction=0.0)).validation) == {"news", "books"}
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 4


def test_nothing_held_out_is_allowed_when_asked_for(text):
    data = open_quietly(text(validation_fraction=0.0))
    assert data.validation == {}
    assert data.train.num_tokens == sum(map(len, TEXTS)) + len(TEXTS)


def test_segment_ids_follow_the_tokenizers_separator(text):
    row = open_quietly(text(segment_ids=True), seq_len=64).train[0]
    assert row["segment_ids"].max() > 1
    ends = np.flatnonzero(row["tokens"][:-1] == 256)
    assert (np.diff(row["segment_ids"])[ends] == 1).all()
    assert (row["positions"][ends + 1] == 0).all()
    assert (row["weights"][ends] == 0).all()


def test_a_tokenizer_json_is_used(text, tmp_path):
    byte_tokenizer_json(tmp_path / "tokenizer.json")
    data = open_quietly(text(tokenizer=str(tmp_path / "tokenizer.json")))
    assert data.tokenizer.separator_id == 256
    assert data.tokenizer.decode(data.train[0]["tokens"]).startswith("This is text")


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """Makes a DataSection over a raw and a NumPy file, 300 tokens each, split in blocks of 20."""
    monkeypatch.setattr(blocks, "block_length", lambda start: 20)
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "raw.bin")
    np.save(tmp_path / "array.npy", np.arange(300, 600, dtype=np.int32))

    def section(**keys):
        files = (str(tmp_path / "raw.bin"), str(tmp_path / "array.npy"))
        return DataSection(**{"source": "tokens", "files": files, "validation_fraction": 0.3, **keys})

    return section


def test_token_files_are_split_without_a_copy(tokens, tmp_path):
    before = sorted(tmp_path.iterdir())
    data = open_quietly(tokens(), seq_len=1, vocab_size=600)
    train, validation = scored(data.train), scored(data.validation["validation"])
    assert len(train) + len(validation) == 598
    assert not set(train) & set(validation)
    assert train == sorted(train)
    assert data.tokenizer is None
    assert data.train.bytes_per_token is None
    assert sorted(tmp_path.iterdir()) == before
    assert "raw.bin" in data.description


def test_the_split_of_token_files_does_not_depend_on_the_window(tokens):
    short, long = (open_quietly(tokens(), seq_len=n, vocab_size=600).validation["validation"] for n in (1, 33))
    assert scored(short) == scored(long)


def test_a_tokenizer_gives_token_files_their_bytes(tokens, tmp_path):
    tokenizer = byte_tokenizer_json(tmp_path / "tokenizer.json")
    ids = np.array([*tokenizer.encode("grün" * 29 + " rot").ids, 256] * 8, np.uint16)
    ids.tofile(tmp_path / "text.bin")
    np.tile(ids, 2).tofile(tmp_path / "train.bin")
    section = tokens(
        tokenizer=str(tmp_path / "tokenizer.json"),
        validation={"text": (str(tmp_path / "text.bin"),)},
        files=(str(tmp_path / "train.bin"),),
    )
    data = open_quietly(section)
    assert data.validation["text"].bytes_per_token == 149 / 150
    # Two in each document, and nothing but the separator stands between two documents.
    assert data.validation["text"].words_per_token == 2 / 150
    assert data.tokenizer.decode(data.validation["text"][0]["tokens"]).startswith("grün")


def test_token_files_with_segment_ids_need_the_separators_id(tokens):
    with pytest.raises(DataError, match=r"data\.separator_id"):
        open_quietly(tokens(segment_ids=True), vocab_size=600)
    data = open_quietly(tokens(segment_ids=True, separator_id=7), vocab_size=600)
    first = next(row for row in (*data.train, *data.validation["validation"]) if 7 in row["tokens"])
    place = first["tokens"].tolist().index(7)
    assert first["segment_ids"][place + 1] == first["segment_ids"][place] + 1


OUTSIDE = r"array\.npy: token 150 is 450, .*model\.vocab_size=450"


def test_some_ids_of_token_files_are_checked_before_training(tokens):
    with pytest.raises(DataError, match=OUTSIDE):
        open_quietly(tokens(validation_fraction=0.0), vocab_size=450)


def test_all_ids_of_token_files_are_checked_when_a_window_is_read(tokens, monkeypatch):
    monkeypatch.setattr(opened_source, "_check_sample", lambda stream: None)
    data = open_quietly(tokens(validation_fraction=0.0), vocab_size=450)
    data.train[0]
    with pytest.raises(DataError, match=OUTSIDE):
        scored(data.train)


def refused(section, **keys):
    with pytest.raises(UserError) as error:
        open_quietly(section, **keys)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_vocabulary_that_is_too_small_is_refused(text):
    message = refused(text(), vocab_size=256)
    assert message.startswith("data.tokenizer=bytes: ")
    assert "largest id 256" in message
    assert "model.vocab_size=256" in message
    assert "at least 257" in message


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_of_few_documents_one_at_least_is_on_each_side(text, fraction):
    data = open_quietly(text(validation_fraction=fraction), seq_len=8)
    sizes = [data.train.num_tokens, data.validation["validation"].num_tokens]
    assert 0 < min(sizes) <= 120 < max(sizes)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.97])
def test_of_one_block_of_tokens_the_share_is_held_out(tmp_path, fraction):
    np.arange(20_000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    section = DataSection(source="tokens", files=(str(tmp_path / "a.bin"),), validation_fraction=fraction)
    data = open_quietly(section, seq_len=1, vocab_size=20_000)
    assert data.train.num_tokens + data.validation["validation"].num_tokens == 20_000
    assert data.validation["validation"].num_tokens / 20_000 == pytest.approx(fraction, abs=0.15)


def test_too_little_to_train_on_is_refused(text):
    needed = open_quietly(text()).train.num_tokens
    open_quietly(text(), seq_len=needed - 1)
    message = refused(text(), seq_len=needed)
    assert message.startswith(f"train.seq_len={needed}: ")
    assert f"{needed} to train on" in message


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_only_a_fraction_that_holds_something_out_is_to_be_lowered(text, fraction):
    message = refused(text(validation_fraction=fraction), seq_len=100_000)
    assert "lower train.seq_len, or give more data" in message
    assert ("data.validation_fraction" in message) == (fraction > 0)


def test_the_description_counts_documents(text, tmp_path):
    """A text that is held out in blocks is one document in several pieces."""
    assert "1 text file: 50 documents, " in open_quietly(text()).description
    lines = "".join(f"This is line {number} of a text.\n" for number in range(4000))
    (tmp_path / "a.txt").write_text(lines)
    section = text(files=(str(tmp_path / "a.txt"),), validation_fraction=0.0)
    assert "1 text file: 1 document, " in open_quietly(section).description
    data = open_quietly(dataclasses.replace(section, validation_fraction=0.1), seq_len=1)
    ends = sum((np.array(scored(windows)) == 256).sum() for windows in (data.train, data.validation["validation"]))
    assert f"1 text file: 1 document in {ends} pieces, " in data.description
    assert ends > 5


def test_a_named_set_must_be_good_too(text, tokens, tmp_path):
    np.array([1], np.uint16).tofile(tmp_path / "one.bin")
    message = refused(tokens(validation={"one": (str(tmp_path / "one.bin"),)}), vocab_size=600)
    assert message.startswith("data.validation.one: ")
    assert "data.validation.news: no such file" in refused(text(validation={"news": ("/nowhere.txt",)}))
    assert refused(text(validation={"validation": ("x",)})).startswith("data.validation.validation: ")


@pytest.mark.parametrize("separator_id", [600, 10**6])
def test_a_separator_outside_the_vocabulary_is_refused(tokens, separator_id):
    message = refused(tokens(segment_ids=True, separator_id=separator_id), vocab_size=600)
    assert message.startswith(f"data.separator_id={separator_id}: ")


def test_tokens_are_those_whose_identity_was_taken(tmp_path, monkeypatch):
    """A shard that is overwritten right after its identity was taken is not read as the shard that it was."""
    shard = tmp_path / "a.npy"
    np.save(shard, np.arange(100_000, dtype=np.uint16))
    os.utime(shard, ns=(1, 10**18))
    take = opened_source.identities

    def take_and_overwrite(*arguments):
        taken = take(*arguments)
        np.save(shard, np.arange(100_000, dtype=np.uint16)[::-1])
        return taken

    monkeypatch.setattr(opened_source, "identities", take_and_overwrite)
    with pytest.raises(DataError, match=r"a\.npy: was changed while it was in use"):
        open_quietly(
            DataSection(source="tokens", files=(str(shard),), validation_fraction=0.0), vocab_size=100_000
        ).train[0]


def test_moving_all_token_files_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "block_length", lambda start: 20)
    for part in range(6):
        (tmp_path / "old" / str(part)).mkdir(parents=True)
        np.arange(part * 20, part * 20 + 20, dtype=np.uint16).tofile(tmp_path / "old" / str(part) / "same.bin")

    def held_out(directory):
        files = (str(tmp_path / directory / "*" / "*.bin"),)
        section = DataSection(source="tokens", files=files, validation_fraction=0.5)
        data = open_quietly(section, seq_len=1, vocab_size=120)
        return scored(data.validation["validation"]), data.first.files

    before = held_out("old")
    assert 0 < len(before[0]) < 119
    (tmp_path / "old").rename(tmp_path / "new")
    assert held_out("new") == before
    assert [file.name for file in before[1]] == [f"{part}/same.bin" for part in range(6)]


def test_one_text_is_held_out_in_blocks_of_its_lines(tmp_path):
    lines = [f"This is line {number} of a text.\n" for number in range(4000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    section = DataSection(source="text", files=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path / "cache"))
    data = open_quietly(dataclasses.replace(section, validation_fraction=0.1))
    held = data.tokenizer.decode(scored(data.validation["validation"]))
    share = data.validation["validation"].num_tokens / sum(map(len, lines))
    assert share == pytest.approx(0.1, abs=0.06)
    assert set(held.splitlines(keepends=True)[1:]) <= set(lines)
    train = data.tokenizer.decode(scored(data.train))
    assert not set(train.splitlines()) & set(held.splitlines()[1:])


@pytest.mark.parametrize("line", ["word " * 60_000, "a" * 300_000, "grün" * 60_000])
def test_one_line_without_end_is_cut_between_characters(tmp_path, line):
    text = "".join(f"{part}{line[:500]}" for part in range(400))
    (tmp_path / "a.txt").write_text(text)
    section = DataSection(source="text", files=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path / "cache"))
    data = open_quietly(dataclasses.replace(section, validation_fraction=0.2))
    held = data.validation["validation"].num_tokens
    assert held / (held + data.train.num_tokens) == pytest.approx(0.2, abs=0.1)
    assert "\ufffd" not in data.tokenizer.decode(scored(data.validation["validation"]))


def test_a_text_of_two_lines_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("two\nlines\n")
    section = DataSection(source="text", files=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path / "cache"))
    assert "one block of lines, only" in refused(section)


def test_a_long_text_is_one_document_whatever_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 3000)
    monkeypatch.setattr(tokenizing, "LONG_CHARACTERS", 2000)
    text = "".join(f"Line {number} grün\n" for number in range(2000))
    (tmp_path / "a.txt").write_text(text)
    section = DataSection(
        source="text", files=(str(tmp_path / "a.txt"),), cache_dir=str(tmp_path / "cache"), validation_fraction=0
    )
    data = open_quietly(section, seq_len=1)
    assert data.train.num_tokens == len(text.encode()) + 1
    assert data.tokenizer.decode(scored(data.train)) == text[1:]


def test_a_copied_token_file_would_be_held_out_and_trained_on(tokens, tmp_path):
    section = tokens()
    shutil.copy(tmp_path / "array.npy", tmp_path / "copy.npy")
    twice = dataclasses.replace(section, files=(*section.files, str(tmp_path / "copy.npy")))
    with pytest.raises(
        DataError, match=r"data\.files: copy\.npy has the content of array\.npy, so parts of it would be"
    ):
        open_quietly(twice, vocab_size=1000)
    open_quietly(dataclasses.replace(twice, validation_fraction=0.0), vocab_size=1000)  # read twice on purpose


def test_a_held_out_share_that_is_far_from_what_was_asked_for_says_so(text, tmp_path):
    assert "asks for" not in open_quietly(text()).description
    (tmp_path / "three.jsonl").write_text("\n".join(json.dumps({"text": f"{each} " * 100}) for each in "abc"))
    few = open_quietly(text(files=(str(tmp_path / "three.jsonl"),), validation_fraction=0.01))
    assert re.search(r"held out \(33\.\d\d% where data\.validation_fraction asks for 1\.00%\)", few.description)
