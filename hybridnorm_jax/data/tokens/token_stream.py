"""One long stream of tokens: stretches of files, one after the other, and where their documents end."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from hybridnorm_jax.data.tokens.document_ends import DocumentEnds
from hybridnorm_jax.errors import DataError

# Separators are looked for in so many tokens at a time.
SCANNED = 1 << 22


class Tokens(Protocol):
    """A 1-D array of integers, or a file of them that is read in slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Extent:
    """Tokens [start, stop) of an array.

    Attributes:
      array, start, stop: where they are.
      name: the file, for messages.
      is_raw: whether data.token_dtype alone says which numbers the file holds, for messages.
      ends: where the documents of the whole array end, as document_ends.py says; None: unknown.
      targets: 1 for each token of the whole array that is learned, 0 for the others; None: all are.
    """

    array: Tokens
    name: str
    start: int
    stop: int
    is_raw: bool = False
    ends: DocumentEnds | np.ndarray | None = None
    targets: Tokens | None = None


class TokenStream:
    """The tokens of several extents, one after the other. None of them continues another's text."""

    def __init__(self, extents: tuple[Extent, ...], vocab_size: int):
        self._extents = extents
        self._ends = np.cumsum([extent.stop - extent.start for extent in extents], dtype=np.int64)
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32.

        Raises:
          DataError: a token outside the vocabulary.
        """
        return np.concatenate(
            [
                self._checked(extent, first, extent.array[first : first + length])
                for extent, first, _, length in self._stretches(start, stop)
            ]
        )

    @property
    def has_targets(self) -> bool:
        """Whether only a part of the tokens is learned."""
        return any(extent.targets is not None for extent in self._extents)

    def targets(self, start: int, stop: int) -> np.ndarray:
        """1 for each of the tokens [start, stop) that is learned, 0 for the others, as float32.

        Raises:
          DataError: a file says something else of a token.
        """
        targets = np.ones(stop - start, np.float32)
        for extent, first, place, length in self._stretches(start, stop):
            if extent.targets is not None:
                found = extent.targets[first : first + length]
                if found.max() > 1:
                    wrong = f"holds {found.max()} for token {first + int(found.argmax())}"
                    right = "1 for a token that is learned and 0 for any other"
                    raise DataError(f"{extent.name}: the .targets.npy beside it {wrong}; it must hold {right}")
                targets[place - start : place - start + length] = found
        return targets

    def begins(self, start: int, tokens: np.ndarray, separator_id: int | None) -> np.ndarray:
        """Which of the tokens from `start` on begin a document, as bool; of the first one nothing is said.

        An extent's index says where its documents end; without one, separators do. An extent begins a document too.
        """
        begins = np.zeros(len(tokens) + 1, bool)
        for extent, first, place, length in self._stretches(start, start + len(tokens)):
            if extent.ends is None and separator_id is None:
                ends = np.empty(0, np.int64)
            elif extent.ends is None:
                here = tokens[place - start : place - start + length]
                ends = 1 + np.flatnonzero(here == separator_id)
            else:
                ends = _indexed(extent.ends, first, first + length) - first
            begins[ends + place - start] = True
            begins[place - start] = True
        begins[0] = False
        return begins[:-1]

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[Extent, int, int, int]]:
        """(extent, where in its array, where in the stream, length) of what the tokens [start, stop) consist of."""
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            extent, end = self._extents[index], int(self._ends[index])
            length = min(stop, end) - start
            yield extent, extent.stop - (end - start), start, length
            start += length
            index += 1

    def document_ends(self, separator_id: int | None) -> Iterator[np.ndarray]:
        """The place behind the last token of every document, as int64, ascending, in parts.

        An extent's index says where its documents end; without one, separators do. The end of an extent ends a
        document too.

        Args:
          separator_id: belongs to the document that it ends; None: only indexes and the ends of extents end documents.

        Raises:
          DataError: a token outside the vocabulary, where separators are looked for.
        """
        before = 0
        for extent in self._extents:
            for start in range(extent.start, extent.stop, SCANNED):
                stop = min(start + SCANNED, extent.stop)
                ends = self._ends_within(extent, start, stop, separator_id)
                if stop == extent.stop and (not len(ends) or ends[-1] != stop):
                    ends = np.append(ends, stop)
                yield ends - extent.start + before
            before += extent.stop - extent.start

    def _ends_within(self, extent: Extent, start: int, stop: int, separator_id: int | None) -> np.ndarray:
        """Those of the extent's documents that end in (start, stop], as places of its array."""
        if extent.ends is not None:
            return _indexed(extent.ends, start, stop)
        if separator_id is None:
            return np.empty(0, np.int64)
        tokens = self._checked(extent, start, extent.array[start:stop])
        return start + 1 + np.flatnonzero(tokens == separator_id)

    def marks(self) -> list[list[int | str]] | None:
        """What changes when the tokens or their documents may be others: of every extent its place in its file, and
        the states of that file and of its index.

        None: it is not known, as of an array that no file holds.
        """
        try:
            states = {name: _state(name) for extent in self._extents for name in _files_of(extent)}
        except OSError:
            return None
        return [
            [extent.name, extent.start, extent.stop, *(mark for name in _files_of(extent) for mark in states[name])]
            for extent in self._extents
        ]

    def _checked(self, extent: Extent, first: int, tokens: np.ndarray) -> np.ndarray:
        wrong = (tokens < 0) | (tokens >= self._vocab_size)
        if wrong.any():
            place = int(wrong.argmax())
            if tokens[place] < 0:
                right = "ids begin at 0; write them again as uint16 or uint32, which hold ids that int16 does not"
            else:
                check = ", and check data.token_dtype" if extent.is_raw else ""
                right = f"set model.vocab_size to the tokenizer's{check}"
            wrong_token = f"token {first + place} is {tokens[place]}, outside model.vocab_size={self._vocab_size}"
            raise DataError(f"{extent.name}: {wrong_token}; {right}")
        return tokens.astype(np.int32)


def _files_of(extent: Extent) -> list[str]:
    """The files on this machine that hold an extent's tokens and, if there is one, its index."""
    tokens = getattr(extent.array, "local_path", extent.name)
    return [tokens, extent.ends.path] if isinstance(extent.ends, DocumentEnds) else [tokens]


def _state(path: str) -> list[int]:
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]


def _indexed(ends: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The ends of documents in (start, stop]."""
    # Numbers of another type than the index would be compared as floats, all of it after a conversion.
    first, last = np.searchsorted(ends, np.array([start, stop], ends.dtype), side="right")
    return np.array(ends[first:last], np.int64)
