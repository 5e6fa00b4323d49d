"""Rows of whole documents: where these stand is computed once and kept; a row is read when it is asked for."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from hybridnorm_jax.data.places.cache_directory import cache_root, refusals_of_cache
from hybridnorm_jax.data.places.whole_directories import whole_directory
from hybridnorm_jax.data.rows.fill_in_the_middle import ADDED_TOKENS, FillInTheMiddle
from hybridnorm_jax.data.rows.packing import PIECE, PackedStretch, pack
from hybridnorm_jax.data.tokens.token_stream import TokenStream
from hybridnorm_jax.streams import can_redraw

# Part of every fingerprint: raise it when the same inputs give other rows than before.
FORMAT = 1
# The rows of shorter streams are computed in less time than it takes to read a line that says so.
MOST_IN_MEMORY = 1 << 24
# Of so many rows the tokens are counted at a time.
COUNTED_ROWS = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents are put into rows.

    Attributes:
      seq_len: inputs of a row.
      one_in_a_row: whether every document gets a row of its own.
      separator_id: the id that ends a document, where no index says so.
      segment_ids: whether rows say which document a token belongs to.
      fim: which documents are rearranged in training; None: none.
      cache_dir: where the rows of a long stream are kept.
      progress: whether a terminal shows a progress bar.
    """

    seq_len: int
    one_in_a_row: bool
    separator_id: int | None
    segment_ids: bool
    fim: FillInTheMiddle | None = None
    cache_dir: str
    progress: bool = False

    @property
    def added(self) -> int:
        """The most tokens by which a document becomes longer."""
        return 0 if self.fim is None else ADDED_TOKENS


class PackedRows:
    """A random-access source of rows of whole documents, in the place of Windows.

    A row is a dict of arrays (seq_len,) as that of Windows, but its documents are whole; one that is longer than a row
    is cut. The last token of a document, its separator, is a target and no input. So every token but the first of
    each document is a target once. What is left of a row has weight 0, segment 0, token 0 and position 0.

    Which documents share a row follows from the data alone.

    Attributes:
      num_tokens, bytes_per_token, words_per_token: as those of Windows.
      padding: the share of all positions that hold no document.
    """

    def __init__(
        self,
        stream: TokenStream,
        packing: Packing,
        *,
        bytes_per_token: float | None = None,
        words_per_token: float | None = None,
        stride: int | None = None,
    ):
        self._stream = stream
        self._packing = packing
        self.num_tokens = len(stream)
        self.bytes_per_token = bytes_per_token
        self.words_per_token = words_per_token
        self._pieces, self._row_ends = _placed(stream, packing, stride or packing.seq_len)
        positions = len(self._row_ends) * packing.seq_len
        self.padding = 1 - int(self._pieces["length"].sum(dtype=np.int64)) / max(positions, 1)

    @functools.cached_property
    def tokens_of_rows(self) -> Int[np.ndarray, " rows"]:
        """See Rows. Of ten million rows it is 20 or 40 MB."""
        lengths = np.zeros(len(self), np.min_scalar_type(self._packing.seq_len))
        for first in range(0, len(self), COUNTED_ROWS):
            ends = self._row_ends[first : first + COUNTED_ROWS]
            begin = int(self._row_ends[first - 1]) if first else 0
            pieces = self._pieces["length"][begin : int(ends[-1])]
            # Every row has a piece, without which `reduceat` would give the next row's.
            lengths[first : first + len(ends)] = np.add.reduceat(pieces, np.concatenate([[0], ends[:-1] - begin]))
        return lengths

    def with_stride(self, stride: int | None) -> Self:
        """The same documents; those that are cut are cut into pieces that overlap. None: that do not."""
        return type(self)(
            self._stream,
            self._packing,
            bytes_per_token=self.bytes_per_token,
            words_per_token=self.words_per_token,
            stride=stride,
        )

    def beginning(self, count: int) -> Int[np.ndarray, " tokens"]:
        """The first `count` tokens, fewer where there are not so many."""
        return self._stream.read(0, min(count, self.num_tokens))

    def __len__(self) -> int:
        return len(self._row_ends)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._row(index, lambda tokens, start: tokens)

    def drawn(self, index: int, *, seed: int, epoch: int) -> dict[str, np.ndarray]:
        """See Rows."""
        fim = self._packing.fim
        if fim is None:
            return self[index]
        return self._row(index, lambda tokens, start: fim.rearranged(tokens, seed=seed, epoch=epoch, start=start))

    def _row(self, index: int, arranged: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, np.ndarray]:
        """A row, of which `arranged` gets every piece: (its tokens, where they stand) -> the tokens that are read."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        seq_len = self._packing.seq_len
        row = {
            "tokens": np.zeros(seq_len, np.int32),
            "targets": np.zeros(seq_len, np.int32),
            "weights": np.zeros(seq_len, np.float32),
        }
        documents = {"segment_ids": np.zeros(seq_len, np.int32), "positions": np.zeros(seq_len, np.int32)}
        begin = 0
        first = int(self._row_ends[index - 1]) if index else 0
        for number, piece in enumerate(self._pieces[first : int(self._row_ends[index])], start=1):
            start, length, context = (int(value) for value in piece)
            tokens = arranged(self._stream.read(start, start + length + 1), start)
            place = slice(begin, begin + len(tokens) - 1)
            row["tokens"][place], row["targets"][place] = tokens[:-1], tokens[1:]
            row["weights"][place] = 1
            if self._stream.has_targets:
                row["weights"][place] = self._stream.targets(start + 1, start + length + 1)
            row["weights"][begin : begin + context] = 0
            documents["segment_ids"][place] = number
            documents["positions"][place] = np.arange(len(tokens) - 1)
            begin = place.stop
        return row | documents if self._packing.segment_ids else row


def _placed(stream: TokenStream, packing: Packing, stride: int) -> tuple[np.ndarray, Int[np.ndarray, " rows"]]:
    """(pieces row by row, the place behind the last piece of every row), kept in files where the stream is long."""
    marks = None if len(stream) <= MOST_IN_MEMORY else stream.marks()
    if marks is None:
        stretches = list(_stretches(stream, packing, stride))
        pieces = np.concatenate([np.empty(0, PIECE), *(stretch.pieces for stretch in stretches)])
        counts = np.concatenate([np.empty(0, np.int64), *(stretch.pieces_of_rows for stretch in stretches)])
        return pieces, np.cumsum(counts)
    inputs = [FORMAT, packing.seq_len, packing.one_in_a_row, packing.separator_id, packing.added, stride, marks]
    fingerprint = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
    root = cache_root(packing.cache_dir, fingerprint)
    directory = root / fingerprint
    with refusals_of_cache(root):
        placed = _open(directory)
        if placed is None:
            shutil.rmtree(directory, ignore_errors=True)
            with whole_directory(directory, is_whole=lambda: _open(directory) is not None) as partial:
                _write(partial, _stretches(stream, packing, stride))
            placed = _open(directory)
    return placed


def _open(directory: pathlib.Path) -> tuple[np.ndarray, Int[np.ndarray, " rows"]] | None:
    """What a directory holds; None where there is none, or where its files do not belong together."""
    try:
        pieces, row_ends = _mapped(directory / "pieces", PIECE), _mapped(directory / "row_ends", np.dtype("<i8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return (pieces, row_ends) if (int(row_ends[-1]) if len(row_ends) else 0) == len(pieces) else None


def _mapped(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _write(directory: pathlib.Path, stretches: Iterator[PackedStretch]) -> None:
    written = 0
    with open(directory / "pieces", "wb") as pieces, open(directory / "row_ends", "wb") as row_ends:
        for stretch in stretches:
            pieces.write(stretch.pieces.tobytes())
            row_ends.write((written + np.cumsum(stretch.pieces_of_rows)).astype("<i8").tobytes())
            written += len(stretch.pieces)
        for file in (pieces, row_ends):
            file.flush()
            os.fsync(file.fileno())


def _stretches(stream: TokenStream, packing: Packing, stride: int) -> Iterator[PackedStretch]:
    """The rows of a stream, with a progress bar over its tokens."""
    shows_bar = packing.progress and can_redraw(sys.stderr)
    with tqdm(
        desc="packing", total=len(stream), unit="token", unit_scale=True, leave=False, disable=not shows_bar
    ) as bar:

        def ends() -> Iterator[Int[np.ndarray, " documents"]]:
            for part in stream.document_ends(packing.separator_id):
                yield part
                if len(part):
                    bar.update(int(part[-1]) - bar.n)

        yield from pack(
            ends(), seq_len=packing.seq_len, stride=stride, one_in_a_row=packing.one_in_a_row, added=packing.added
        )
