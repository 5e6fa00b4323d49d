"""Which pieces of which documents stand in which row, where no document is cut that fits one.

A document of n tokens is n - 1 inputs with their targets. One that fits a row is one piece. A longer one is cut: each
piece fills a row but for the last, which is packed as if it were a document. Rows are packed within stretches of the
data, so that memory does not grow with their number and the documents of a row lie near each other. Only the ends of
documents are looked at.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.data.rows.best_fit import best_fit_decreasing

# A stretch ends with the first document that makes it so many documents or tokens. With so many to choose from, rows
# are full but for a ten-thousandth (docs/data.md).
STRETCH_DOCUMENTS = 1 << 18
STRETCH_TOKENS = 1 << 28
# Where the first input stands in the stream, how many inputs there are, and how many of them, the first ones, have
# targets that an earlier piece has had.
PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("context", "<i4")])


class PackedStretch(NamedTuple):
    """Rows of one stretch: their pieces, row by row, and how many pieces each row has."""

    pieces: np.ndarray
    pieces_of_rows: Int[np.ndarray, " rows"]


def pack(
    ends: Iterable[Int[np.ndarray, " documents"]], *, seq_len: int, stride: int, one_in_a_row: bool, added: int = 0
) -> Iterator[PackedStretch]:
    """The rows of all documents, a stretch at a time: the same ones, however the ends come in parts.

    The rows of a stretch are in the order of their first document, and so are the documents of a row.

    Args:
      ends: the place behind the last token of every document, ascending, in parts of any size. The first document
        begins at 0.
      seq_len: inputs of a row.
      stride: how much later each piece of a document that is too long begins than the one before. Below seq_len, its
        first seq_len - stride inputs are context: their targets belong to earlier pieces.
      one_in_a_row: whether every piece gets a row of its own.
      added: room for so many more tokens is left to every piece.
    """
    for starts, stops in _stretches(ends):
        pieces = _pieces(starts, stops, seq_len - added, stride - added)
        if one_in_a_row:
            yield PackedStretch(pieces, np.ones(len(pieces), np.int64))
        elif len(pieces):
            yield _rows(pieces, best_fit_decreasing(pieces["length"].astype(np.int64) + added, seq_len))


def _stretches(
    ends: Iterable[Int[np.ndarray, " documents"]],
) -> Iterator[tuple[Int[np.ndarray, " stretch"], Int[np.ndarray, " stretch"]]]:
    """(starts, ends) of the documents of each stretch."""
    begin, waiting = 0, np.empty(0, np.int64)
    for part in ends:
        waiting = np.concatenate([waiting, part])
        while len(waiting):
            count = min(STRETCH_DOCUMENTS, 1 + int(np.searchsorted(waiting, begin + STRETCH_TOKENS)))
            if count > len(waiting):
                break
            yield _with_starts(begin, waiting[:count])
            begin, waiting = int(waiting[count - 1]), waiting[count:]
    if len(waiting):
        yield _with_starts(begin, waiting)


def _with_starts(
    begin: int, ends: Int[np.ndarray, " stretch"]
) -> tuple[Int[np.ndarray, " stretch"], Int[np.ndarray, " stretch"]]:
    return np.concatenate([[begin], ends[:-1]]), ends


def _pieces(
    starts: Int[np.ndarray, " documents"], ends: Int[np.ndarray, " documents"], seq_len: int, stride: int
) -> np.ndarray:
    """The pieces of documents in their order; a document of one token has none."""
    inputs = ends - starts - 1
    counts = np.where(inputs > 0, 1 + -(-np.maximum(inputs - seq_len, 0) // stride), 0)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.empty(len(document), PIECE)
    pieces["start"] = starts[document] + number * stride
    pieces["length"] = np.minimum(inputs[document] - number * stride, seq_len)
    pieces["context"] = np.where(number > 0, seq_len - stride, 0)
    return pieces


def _rows(pieces: np.ndarray, row_of: Int[np.ndarray, " pieces"]) -> PackedStretch:
    """Pieces sorted by row: rows in the order of their first pieces, pieces of a row in their own order."""
    by_row = np.argsort(row_of, kind="stable")
    first = by_row[np.searchsorted(row_of[by_row], np.arange(row_of.max() + 1))]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    row_of = rank[row_of]
    return PackedStretch(pieces[np.argsort(row_of, kind="stable")], np.bincount(row_of))
