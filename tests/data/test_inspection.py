"""What is said of rows: checked against rows that are made by hand."""

import numpy as np
import pytest

from hybridnorm_jax.data.inspection import describe, first_rows, measure_rate, shares
from hybridnorm_jax.data.rows.windows import Windows
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer

TEXTS = ["one", "the second", "3"]
IDS = np.array([token for text in TEXTS for token in [*text.encode(), 256]])


def windows(seq_len, *, separator_id=256, tail=True):
    stream = TokenStream((Extent(IDS, "ids", 0, len(IDS)),), 257)
    return Windows(stream, seq_len=seq_len, tail=tail, segment_ids=separator_id is not None, separator_id=separator_id)


def test_a_row_is_described_by_its_segments():
    lines = list(describe(windows(20)[0], ByteTokenizer()))
    assert lines[0] == "  segment 1: 4 tokens, positions 0 to 3, 3 targets count"
    assert lines[1].startswith('    begins "one<|endoftext|>"  111 110 101 256')
    assert lines[3] == "  segment 2: 11 tokens, positions 0 to 10, 10 targets count"
    assert lines[4].startswith('    begins "the seco"  116 104')
    assert lines[5].startswith('    ends   " second<|endoftext|>"'[:20])
    assert lines[6] == "  segment 3: 1 tokens, positions 0 to 0, 1 targets count"
    assert lines[-1] == "  padding: 4 positions"


def test_without_segments_a_row_is_one():
    lines = list(describe(windows(10, separator_id=None)[1], None))
    assert lines[0] == "  segment 1: 6 tokens, positions 0 to 5, 6 targets count"
    assert lines[1] == "    begins 99 111 110 100 256 51"  # the row's tokens 10 to 15
    assert lines[-1] == "  padding: 4 positions"


def test_shares_are_those_of_the_rows():
    found = shares(windows(20))
    assert found.padding == pytest.approx(4 / 20)
    assert found.without_loss == pytest.approx(2 / 20)  # where a document ends
    assert found.documents == 3
    assert shares(windows(10, separator_id=None)).documents is None
    assert shares(windows(10, separator_id=None)).padding == pytest.approx(4 / 20)
    assert shares(windows(16, separator_id=None, tail=False)).padding == 0


def test_rates_and_first_rows_are_of_the_stream():
    batch = {"tokens": np.arange(24).reshape(2, 3, 4)}
    assert [row["tokens"].tolist() for row in first_rows(batch, 4)] == np.arange(16).reshape(4, 4).tolist()
    assert len(first_rows(batch, 100)) == 6
    read = 0

    def batches():
        nonlocal read
        while True:
            read += 1
            yield batch

    rate = measure_rate(batches(), 0.01)
    assert rate.per_second > 0
    assert read >= 2
