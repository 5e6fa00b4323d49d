"""What the first rows of an order hold: the same as adding them up one by one."""

import itertools

import numpy as np
import pytest

from hybridnorm_jax.data.rows import dealt_tokens, packed_rows
from hybridnorm_jax.data.rows.dealt_tokens import DealtTokens
from hybridnorm_jax.data.rows.order import EpochOrder
from hybridnorm_jax.data.rows.packed_rows import PackedRows, Packing
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream

END = 99


class FakeRows:
    """Rows of which only the numbers of tokens are known."""

    def __init__(self, tokens):
        self.tokens_of_rows = tokens

    def __len__(self):
        return len(self.tokens_of_rows)


def added_up(order, rows):
    """The tokens of the first 0, 1, 2, ... rows."""
    tokens = order.rows.tokens_of_rows
    return [0, *itertools.accumulate(int(tokens[order.place(row).index]) for row in range(rows))]


@pytest.mark.parametrize("count", [1, 5000])
def test_numbers_of_rows_asked_in_any_order(count, monkeypatch):
    monkeypatch.setattr(dealt_tokens, "STRETCH", 1000)
    rng = np.random.default_rng(count)
    order = EpochOrder(FakeRows(rng.integers(0, 50, count).astype(np.uint8)), seed=3, rounds=16)
    expected = added_up(order, 3 * count)
    dealt = DealtTokens(order, seq_len=50)
    for rows in (*range(0, 3 * count + 1, 100), *rng.permutation(3 * count + 1)[:200].tolist(), count, 2 * count):
        assert dealt.of_first(rows) == expected[rows]


def test_a_count_of_which_grain_leaves_one_out():
    count = 65_537
    tokens = np.random.default_rng(0).integers(0, 900, count).astype(np.uint16)
    order = EpochOrder(FakeRows(tokens), seed=3, rounds=16)
    expected = added_up(order, count + 5)
    for rows in (1, count // 2, count - 1, count, count + 1, count + 5):
        assert DealtTokens(order, seq_len=900).of_first(rows) == expected[rows]
    assert expected[count] == tokens.sum()


@pytest.mark.parametrize("one_in_a_row", [False, True])
def test_tokens_of_rows_are_those_that_the_rows_hold(one_in_a_row, monkeypatch):
    monkeypatch.setattr(packed_rows, "COUNTED_ROWS", 7)
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(0, 90, int(rng.integers(0, 40))).tolist(), END] for _ in range(90)]
    ids = np.concatenate(documents).astype(np.uint16)
    packing = Packing(seq_len=16, one_in_a_row=one_in_a_row, separator_id=END, segment_ids=True, cache_dir="/nowhere")
    rows = PackedRows(TokenStream((Extent(ids, "part", 0, len(ids)),), 100), packing)
    assert rows.tokens_of_rows.tolist() == [int((row["segment_ids"] > 0).sum()) for row in rows]
    assert rows.tokens_of_rows.sum() == pytest.approx(len(rows) * 16 * (1 - rows.padding), abs=1e-6)
    assert len(rows) > 7
