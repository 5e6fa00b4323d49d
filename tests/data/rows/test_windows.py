"""Rows of inputs and targets over a stream of tokens."""

import numpy as np
import pytest

from hybridnorm_jax.data import DataError, Windows
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream

END = 99


def stream(*parts, vocab_size=100):
    extents = tuple(Extent(np.array(part, np.uint16), f"part{i}", 0, len(part)) for i, part in enumerate(parts))
    return TokenStream(extents, vocab_size)


def test_a_hand_written_row_with_segments():
    # Documents: the end of one, a whole one of two tokens, an empty one (only its separator), the begin of one.
    tokens = [5, 6, END, 7, 8, END, END, 9, 10, 11]
    (row,) = Windows(stream(tokens), seq_len=9, tail=False, segment_ids=True, separator_id=END)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [5, 6, END, 7, 8, END, END, 9, 10],
        "targets": [6, END, 7, 8, END, END, 9, 10, 11],
        "weights": [1, 1, 0, 1, 1, 0, 0, 1, 1],
        "segment_ids": [1, 1, 1, 2, 2, 2, 3, 4, 4],
        "positions": [0, 1, 2, 0, 1, 2, 0, 0, 1],
    }
    assert {values.dtype.name for name, values in row.items() if name != "weights"} == {"int32"}
    assert row["weights"].dtype == np.float32


def test_segments_count_anew_in_every_row():
    rows = list(Windows(stream([1, END, 2, 3, 4, END, 5]), seq_len=3, tail=False, segment_ids=True, separator_id=END))
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 2], [1, 1, 1]]
    assert [row["positions"].tolist() for row in rows] == [[0, 1, 0], [0, 1, 2]]


def test_a_row_that_begins_after_a_separator_begins_a_document():
    rows = list(Windows(stream([1, 2, END, 3, 4, 5, 6]), seq_len=3, tail=False, segment_ids=True, separator_id=END))
    assert rows[0]["weights"].tolist() == [1, 1, 0]
    assert rows[1]["positions"].tolist() == [0, 1, 2]
    assert rows[1]["weights"].tolist() == [1, 1, 1]


def test_without_segments_rows_run_across_documents():
    (row,) = Windows(stream([1, END, 2, 3]), seq_len=3, tail=False)
    assert set(row) == {"tokens", "targets", "weights"}
    assert row["weights"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [2, 3, 12, 13, 14, 17])
def test_with_a_tail_every_token_but_the_first_is_a_target_once(count):
    windows = Windows(stream(range(count)), seq_len=4, tail=True)
    scored = [int(t) for row in windows for t, w in zip(row["targets"], row["weights"], strict=True) if w]
    assert scored == list(range(1, count))
    assert all(row["tokens"].shape == (4,) for row in windows)
    inputs = [int(t) for row in windows for t, w in zip(row["tokens"], row["weights"], strict=True) if w]
    assert inputs == list(range(count - 1))


@pytest.mark.parametrize("stride", [1, 2, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7, 8, 20, 21])
def test_rows_that_overlap_have_every_token_but_the_first_as_a_target_once(count, stride):
    windows = Windows(stream(list(range(count))), seq_len=5, tail=True).with_stride(stride)
    found = []
    for row in windows:
        assert len(row["tokens"]) == 5
        for place in np.flatnonzero(row["weights"]):
            assert row["targets"][place] == row["tokens"][place] + 1
            # At least seq_len - stride tokens are read before the target, where there are as many.
            assert place + 1 >= min(5 - stride + 1, row["targets"][place])
            found.append(int(row["targets"][place]))
    assert found == list(range(1, count))
    assert len(Windows(stream(list(range(count))), seq_len=5, tail=True)) == -(-max(count - 1, 0) // 5)


def test_rows_that_overlap_keep_documents_apart():
    windows = Windows(
        stream([1, 2, END, 3, 4, 5, 6, 7]), seq_len=4, tail=True, segment_ids=True, separator_id=END
    ).with_stride(2)
    assert [row["weights"].tolist() for row in windows] == [[1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0]]
    assert windows.with_stride(None)[0]["weights"].tolist() == [1, 1, 0, 1]
    assert len(windows.with_stride(None)) == 2


def test_training_drops_the_tail():
    windows = Windows(stream(range(12)), seq_len=4, tail=False)
    assert [row["targets"].tolist() for row in windows] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(Windows(stream(range(13)), seq_len=4, tail=False)) == 3


def test_the_filled_part_of_a_tail_is_nobodys():
    last = Windows(stream([1, 2, 3, END, 4]), seq_len=3, tail=True, segment_ids=True, separator_id=END)[1]
    assert last["weights"].tolist() == [0, 0, 0]  # separator -> 4 is another document
    assert last["segment_ids"].tolist() == [1, 0, 0]


def test_rows_run_across_the_parts_of_a_stream():
    parts = [range(0, 3), range(3, 4), range(4, 11)]
    whole = list(Windows(stream(range(11)), seq_len=5, tail=True))
    pieces = list(Windows(stream(*parts), seq_len=5, tail=True))
    assert len(whole) == len(pieces) == 2
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one["targets"], other["targets"])


def test_an_extent_is_a_stretch_of_its_array():
    array = np.arange(20, dtype=np.int32)
    both = TokenStream((Extent(array, "f", 4, 7), Extent(array, "f", 15, 20)), 100)
    assert len(both) == 8
    assert both.read(0, 8).tolist() == [4, 5, 6, 15, 16, 17, 18, 19]
    assert both.read(2, 4).tolist() == [6, 15]


def test_there_is_no_row_outside():
    windows = Windows(stream(range(9)), seq_len=4, tail=False)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize(
    ("tokens", "dtype", "wrong"), [([1, 2, 3, 257], np.uint16, 257), ([1, 2, 3, -1], np.int32, -1)]
)
def test_an_id_outside_the_vocabulary_is_named_with_its_place(tokens, dtype, wrong):
    fine = Extent(np.arange(5, dtype=dtype), "fine.bin", 0, 5)
    bad = Extent(np.array([1, 2, 3, wrong], dtype), "bad.bin", 1, 4)
    windows = Windows(TokenStream((fine, bad), 256), seq_len=4, tail=True)
    windows[0]
    with pytest.raises(DataError, match=rf"^bad\.bin: token 3 is {wrong}, .*model\.vocab_size=256"):
        windows[1]


def test_a_document_does_not_run_into_the_next_file():
    (row,) = Windows(stream([1, 2], [3, END], [4, 5]), seq_len=5, tail=False, segment_ids=True, separator_id=END)
    assert row["weights"].tolist() == [1, 0, 1, 0, 1]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2, 3]
    assert row["positions"].tolist() == [0, 1, 0, 1, 0]


def test_an_index_says_where_documents_end_and_separators_inside_do_not():
    tokens = np.array([1, END, 2, END, 3, 4, END, 5], np.uint16)
    for start, ends in ((0, [4, 7, 8]), (1, [4, 7, 8])):
        extent = Extent(tokens, "indexed", start, 8, ends=np.array(ends, "<u8"))
        (row,) = Windows(TokenStream((extent,), 100), seq_len=7 - start, tail=False, segment_ids=True, separator_id=END)
        assert row["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2][start:]
        assert row["weights"].tolist() == [1, 1, 1, 0, 1, 1, 0][start:]
        assert row["positions"].tolist() == [*range(4 - start), 0, 1, 2]


def test_what_is_not_learned_has_no_weight_in_windows_and_across_files():
    parts = [Extent(np.arange(5, dtype=np.uint16), "a", 1, 5, targets=np.array([9, 1, 0, 1, 1], np.uint8))]
    parts += [Extent(np.arange(3, dtype=np.uint16), "b", 0, 3)]
    (row,) = Windows(TokenStream(tuple(parts), 100), seq_len=6, tail=False)
    assert row["targets"].tolist() == [2, 3, 4, 0, 1, 2]
    assert row["weights"].tolist() == [0, 1, 1, 1, 1, 1]
    assert row["weights"].dtype == np.float32
