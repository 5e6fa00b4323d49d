"""Rows of whole documents over a stream of tokens."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.rows import packed_rows, packing
from hybridnorm_jax.data.rows.packed_rows import PackedRows, Packing
from hybridnorm_jax.data.tokens import token_stream
from hybridnorm_jax.data.tokens.token_files import open_token_file
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream

END = 99
PLAIN = Packing(seq_len=6, one_in_a_row=False, separator_id=END, segment_ids=True, cache_dir="/nowhere")


def stream(*parts, vocab_size=100):
    extents = tuple(Extent(np.array(part, np.uint16), f"part{i}", 0, len(part)) for i, part in enumerate(parts))
    return TokenStream(extents, vocab_size)


def drawn(rng, documents=40):
    """(tokens, the documents)."""
    found = [[*rng.integers(0, 90, int(rng.integers(0, 20))).tolist(), END] for _ in range(documents)]
    return [token for document in found for token in document], found


def targets(rows):
    """Every pair of what a target of weight 1 follows within its document, and the target."""
    found = []
    for row in rows:
        for place in np.flatnonzero(row["weights"]):
            begin = place - row["positions"][place]
            assert (row["segment_ids"][begin : place + 1] == row["segment_ids"][place]).all()
            found.append((tuple(row["tokens"][begin : place + 1].tolist()), int(row["targets"][place])))
    return sorted(found)


def test_a_hand_written_row():
    tokens = [5, 6, END, 7, END, END, 8, 9, 10, END]
    rows = list(PackedRows(stream(tokens), PLAIN))
    assert len(rows) == 1
    assert {name: values.tolist() for name, values in rows[0].items()} == {
        "tokens": [5, 6, 7, 8, 9, 10],
        "targets": [6, END, END, 9, 10, END],
        "weights": [1, 1, 1, 1, 1, 1],
        "segment_ids": [1, 1, 2, 3, 3, 3],
        "positions": [0, 1, 0, 0, 1, 2],
    }
    assert {values.dtype.name for name, values in rows[0].items() if name != "weights"} == {"int32"}
    assert rows[0]["weights"].dtype == np.float32


def test_what_is_left_of_a_row_is_nobodys():
    rows = PackedRows(stream([5, 6, END, 7, 8, END]), dataclasses.replace(PLAIN, seq_len=7))
    (row,) = rows
    assert row["weights"].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2, 0, 0, 0]
    assert row["tokens"].tolist() == [5, 6, 7, 8, 0, 0, 0]
    assert rows.padding == pytest.approx(3 / 7)


def test_every_token_but_a_documents_first_is_a_target_once():
    tokens, documents = drawn(np.random.default_rng(0))
    rows = PackedRows(stream(tokens), PLAIN)
    expected = []
    for document in documents:
        for place in range(1, len(document)):
            begin = (place - 1) // 6 * 6  # a document of more than 6 inputs is cut
            expected.append((tuple(document[begin:place]), document[place]))
    assert targets(rows) == sorted(expected)
    assert rows.padding == pytest.approx(1 - sum(len(each) - 1 for each in documents) / (6 * len(rows)))


@pytest.mark.parametrize("stride", [1, 2, 5, 6])
def test_with_a_stride_targets_of_cut_documents_see_more(stride):
    tokens = [*range(20), END, 50, 51, 52, END]
    rows = PackedRows(stream(tokens), PLAIN).with_stride(stride)
    found = targets(rows)
    assert [target for _, target in found] == [*range(1, 20), END, 51, 52, END]
    for context, target in found[:19]:
        assert context == tuple(range(target - len(context), target))
        assert 6 >= len(context) >= min(6 - stride + 1, target)
    assert targets(rows.with_stride(None)) == targets(PackedRows(stream(tokens), PLAIN))


def test_a_document_does_not_run_into_the_next_file():
    rows = list(PackedRows(stream([1, 2], [3, END], [4, 5]), PLAIN))
    assert targets(rows) == [((1,), 2), ((3,), END), ((4,), 5)]


def test_an_index_says_the_same_as_separators(monkeypatch):
    monkeypatch.setattr(token_stream, "SCANNED", 7)
    tokens, documents = drawn(np.random.default_rng(2))
    ends = np.cumsum([len(each) for each in documents]).astype("<u8")
    array = np.array(tokens, np.uint16)
    # Also of a stretch of the file that begins and ends inside documents.
    for start, stop in ((0, len(array)), (5, len(array) - 3), (0, 1)):
        indexed, bare = (TokenStream((Extent(array, "f", start, stop, ends=each),), 100) for each in (ends, None))
        expected = np.concatenate(list(bare.document_ends(END))).tolist()
        assert np.concatenate(list(indexed.document_ends(None))).tolist() == expected
        assert expected[-1] == stop - start
        assert sorted(set(expected)) == expected


def test_one_document_a_row_needs_no_segments():
    packing_of_one = dataclasses.replace(PLAIN, one_in_a_row=True, segment_ids=False)
    rows = list(PackedRows(stream([5, 6, END, 7, END]), packing_of_one))
    assert [set(row) for row in rows] == [{"tokens", "targets", "weights"}] * 2
    assert [row["targets"].tolist() for row in rows] == [[6, END, 0, 0, 0, 0], [END, 0, 0, 0, 0, 0]]


def test_there_is_no_row_outside():
    rows = PackedRows(stream([5, 6, END]), PLAIN)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            rows[index]


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Opens rows of a file of tokens as if it were too long for its rows to be kept in memory."""
    monkeypatch.setattr(packed_rows, "MOST_IN_MEMORY", 0)
    monkeypatch.setattr(packing, "STRETCH_DOCUMENTS", 7)
    tokens, _ = drawn(np.random.default_rng(3))
    file = tmp_path / "tokens.npy"
    file.write_bytes(np.array(tokens, np.uint16).tobytes())

    def open_rows(**keys):
        array = np.fromfile(file, np.uint16)
        options = dataclasses.replace(PLAIN, cache_dir=str(tmp_path / "cache"), **keys)
        return PackedRows(TokenStream((Extent(array, str(file), 0, len(array)),), 100), options)

    open_rows.file, open_rows.cache = file, tmp_path / "cache"
    return open_rows


def same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        assert all(np.array_equal(left[name], right[name]) for name in left)


def test_rows_that_are_kept_in_files_are_the_same(on_disk, monkeypatch):
    kept = on_disk()
    assert [path.is_dir() for path in on_disk.cache.iterdir()] == [True]
    monkeypatch.setattr(packed_rows, "pack", lambda *_, **__: pytest.fail("they are there already"))
    same(kept, on_disk())
    monkeypatch.undo()
    monkeypatch.setattr(packing, "STRETCH_DOCUMENTS", 7)
    same(kept, on_disk())


def test_other_rows_have_other_files(on_disk):
    on_disk()
    on_disk(one_in_a_row=True)
    on_disk(separator_id=3)
    on_disk().with_stride(2)
    assert len(list(on_disk.cache.iterdir())) == 4
    content = np.fromfile(on_disk.file, np.uint16)
    content[:-1].tofile(on_disk.file)
    on_disk()
    assert len(list(on_disk.cache.iterdir())) == 5


def test_damaged_files_are_computed_again(on_disk):
    expected = [dict(row) for row in on_disk()]
    (directory,) = on_disk.cache.iterdir()
    pieces = directory / "pieces"
    pieces.write_bytes(pieces.read_bytes()[:-16])
    same(on_disk(), expected)


def test_a_cache_that_cannot_be_written_is_one_line(on_disk):
    on_disk.cache.write_text("a file where the directory should be")
    with pytest.raises(DataError, match=r"^data\.cache_dir=\S+: cannot be used .*; name another directory") as error:
        on_disk()
    assert "\n" not in str(error.value)


TEXTS = [f"This is text {number}. " * (number % 5 + 1) for number in range(50)]


@pytest.fixture
def section(tmp_path):
    """Makes a DataSection over 50 documents."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXTS))
    keys = {"source": "text", "files": (str(tmp_path / "*.jsonl"),), "cache_dir": str(tmp_path / "cache")}
    return lambda **more: DataSection(**(keys | {"validation_fraction": 0.3} | more))


def opened(section, seq_len=32):
    return open_data(section, seq_len=seq_len, vocab_size=257, progress=False)


@pytest.mark.parametrize("kind", ["documents", "padded"])
def test_text_is_packed_in_training_and_evaluation(section, kind):
    data = opened(section(packing=kind, segment_ids=True), seq_len=200)
    texts = []
    for rows in (data.train, data.validation["validation"]):
        for row in rows:
            for number in range(1, row["segment_ids"].max() + 1):
                ids = row["tokens"][row["segment_ids"] == number]
                assert row["targets"][row["segment_ids"] == number][-1] == 256
                texts.append(data.tokenizer.decode(ids))
        assert 0 < rows.padding < 1
    assert sorted(texts) == sorted(TEXTS)
    assert f"in {len(data.train):,} rows with {data.train.padding:.3%} padding" in data.description
    if kind == "padded":
        assert len(data.train) + len(data.validation["validation"]) == 50


def test_fewer_tokens_than_a_row_are_a_row(section):
    assert len(opened(section(packing="documents"), seq_len=1 << 16).train) == 1


def test_token_files_need_the_separator_to_be_packed(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(100, dtype=np.uint16))
    for kind in ("documents", "padded"):
        section = DataSection(source="tokens", files=(str(tmp_path / "t.npy"),), packing=kind)
        with pytest.raises(
            DataError, match=rf"^data\.separator_id=null: data\.packing={kind} with token files \(data\.files\)"
        ):
            opened(section)


def test_documents_without_a_target_are_refused(tmp_path):
    np.save(tmp_path / "t.npy", np.full(100, 7, np.uint16))
    files = {"source": "tokens", "files": (str(tmp_path / "t.npy"),), "separator_id": 7}
    with pytest.raises(DataError, match=r"^data\.files: no document has two tokens"):
        opened(DataSection(**files, packing="documents", validation_fraction=0.0))


def test_an_index_that_comes_later_is_seen(tmp_path, monkeypatch):
    """Rows that were kept without it say otherwise where documents end."""
    monkeypatch.setattr(packed_rows, "MOST_IN_MEMORY", 0)
    tokens, documents = drawn(np.random.default_rng(4))
    np.save(tmp_path / "tokens.npy", np.array(tokens, np.uint16))

    def open_rows():
        array = open_token_file(epath.Path(tmp_path / "tokens.npy"), "uint16")
        extent = Extent(array, str(tmp_path / "tokens.npy"), 0, len(array), ends=array.ends)
        return PackedRows(TokenStream((extent,), 100), dataclasses.replace(PLAIN, cache_dir=str(tmp_path / "cache")))

    before = targets(open_rows())
    assert targets(open_rows()) == before
    halves = np.cumsum([len(documents[place]) + len(documents[place + 1]) for place in range(0, len(documents), 2)])
    np.save(tmp_path / "tokens.ends.npy", halves.astype("<u8"))
    assert len(targets(open_rows())) == len(before) + sum(1 for each in documents[1::2] if each)
    assert len(list((tmp_path / "cache").iterdir())) == 2
