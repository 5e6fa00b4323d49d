"""Which documents share a row: best-fit decreasing against a plain one, and what the rows of a stream are."""

import numpy as np
import pytest

from hybridnorm_jax.data.rows import packing
from hybridnorm_jax.data.rows.best_fit import best_fit_decreasing
from hybridnorm_jax.data.rows.packing import pack


def plainly(lengths, capacity):
    """The room that is left in every row, by a loop over the items."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        large_enough = [room for room in rooms if room >= length]
        if large_enough:
            room = min(large_enough)
            rooms.remove(room)
            rooms.append(room - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def test_rows_are_those_of_a_plain_best_fit_decreasing():
    rng = np.random.default_rng(0)
    for _ in range(300):
        capacity = int(rng.integers(1, 40))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 60)))
        rows = best_fit_decreasing(lengths, capacity)
        filled = np.bincount(rows, weights=lengths)
        assert sorted((capacity - filled).tolist()) == plainly(lengths.tolist(), capacity)


def test_nothing_needs_no_row():
    assert best_fit_decreasing(np.empty(0, np.int64), 8).tolist() == []


def rows_of(lengths, parts=1, **keys):
    """Of documents of these numbers of tokens, the pieces of each row as (start, length, context)."""
    ends = np.array_split(np.cumsum(lengths), parts)
    options = {"seq_len": 4, "stride": 4, "one_in_a_row": False} | keys
    found = []
    for stretch in pack(ends, **options):
        rows = np.split(stretch.pieces, np.cumsum(stretch.pieces_of_rows)[:-1])
        found += [row.tolist() for row in rows]
    return found


def test_documents_share_rows_and_long_ones_are_cut():
    # Inputs: 2, 9, 0, 1, 2. Of the second document two pieces fill rows, and its last input is packed.
    assert rows_of([3, 10, 1, 2, 3]) == [
        [(0, 2, 0), (16, 2, 0)],
        [(3, 4, 0)],
        [(7, 4, 0)],
        [(11, 1, 0), (14, 1, 0)],
    ]


def test_one_document_a_row():
    assert rows_of([3, 10, 1, 2], one_in_a_row=True) == [
        [(0, 2, 0)],
        [(3, 4, 0)],
        [(7, 4, 0)],
        [(11, 1, 0)],
        [(14, 1, 0)],
    ]


def test_pieces_that_overlap_say_what_is_context():
    # 9 inputs in rows of 4 that begin 3 apart: 4, then 3 new ones, then 2.
    assert rows_of([10], stride=3) == [[(0, 4, 0)], [(3, 4, 1)], [(6, 3, 1)]]


@pytest.mark.parametrize("documents", [3, 100])
def test_rows_do_not_depend_on_the_parts_in_which_ends_come(documents, monkeypatch):
    monkeypatch.setattr(packing, "STRETCH_DOCUMENTS", documents)
    monkeypatch.setattr(packing, "STRETCH_TOKENS", 50)
    lengths = np.random.default_rng(1).integers(1, 9, 60)
    expected = rows_of(lengths)
    assert all(rows_of(lengths, parts=parts) == expected for parts in (2, 7, 60, 90))
    # Stretches do not share rows, so that what is packed at once is bounded.
    spans = [max(piece[0] for piece in row) - min(piece[0] for piece in row) for row in expected]
    assert max(spans) < 50 + 9


def test_a_stretch_ends_after_so_many_documents_or_tokens(monkeypatch):
    monkeypatch.setattr(packing, "STRETCH_DOCUMENTS", 3)
    monkeypatch.setattr(packing, "STRETCH_TOKENS", 10)
    lengths = [2, 2, 2, 9, 2, 2, 2, 2]
    found = [len(stretch.pieces) for stretch in pack([np.cumsum(lengths)], seq_len=9, stride=9, one_in_a_row=False)]
    assert found == [3, 2, 3]


def test_web_documents_leave_hardly_any_padding():
    lengths = np.exp(np.random.default_rng(2).normal(6.3, 1.2, 40_000)).astype(np.int64) + 2
    for seq_len in (512, 4096):
        (stretch,) = pack([np.cumsum(lengths)], seq_len=seq_len, stride=seq_len, one_in_a_row=False)
        assert stretch.pieces["length"].sum() == (lengths - 1).sum()
        padding = 1 - (lengths - 1).sum() / (len(stretch.pieces_of_rows) * seq_len)
        assert 0 <= padding < 0.002
