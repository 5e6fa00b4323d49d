"""Where the documents of a file of tokens end: an index beside the file, so that nobody has to look for separators.

    train-00000.npy       the tokens of whole documents, one after the other
    train-00000.ends.npy  the index: a 1-D .npy of little-endian uint64, ascending

`ends[i]` is the place behind the last token of document i, counted from the first token of the file. So document i is
tokens [ends[i - 1], ends[i]), the first one from 0 on, and the last end is the number of tokens. A separator belongs to
the document that it ends. A document that is held out in blocks counts as several: what lies between two of its
held-out blocks is one, as in the tokens, where a separator ends each of them.

Megatron's files have an index of their own, which says the same (megatron_index.py).
"""

import functools
from collections.abc import Callable

import numpy as np

from hybridnorm_jax.data.files.companions import ENDS, NUMPY, file_beside
from hybridnorm_jax.data.files.file_state import FileState
from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.errors import DataError, first_line

DTYPE = np.dtype("<u8")
# Indexes that are in memory at once: those of the files that were read last.
MOST_LOADED = 64


class DocumentEnds:
    """The ends of the documents of one file: an array that is read from the disk when it is asked for.

    A run may have thousands of files, and needs their indexes only where documents matter.

    Attributes:
      path: of the index.
    """

    dtype = DTYPE

    def __init__(self, index: Place, read: Callable[..., np.ndarray], *arguments: str | int):
        """Say who reads it.

        Args:
          index: the file.
          read: a function of a module; of the name that the index has on this machine, and of the `arguments`.
        """
        self.path = readable(index)
        self._name, self._state = str(index), FileState.of(index)
        self._read, self._arguments = read, arguments

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All ends.

        Raises:
          DataError: it is no index, that of other tokens, or another one than when the file of tokens was opened.
        """
        return np.asarray(_loaded(self._read, self.path, self._name, self._state, *self._arguments), dtype)

    def __len__(self) -> int:
        return len(np.asarray(self))

    def __getitem__(self, places: slice) -> np.ndarray:
        return np.asarray(self)[places]


@functools.lru_cache(maxsize=MOST_LOADED)
def _loaded(
    read: Callable[..., np.ndarray], path: str, name: str, state: FileState, *arguments: str | int
) -> np.ndarray:
    try:
        state.check(FileState.read(path), name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
    return read(path, *arguments)


def document_ends(tokens: Place, count: int) -> DocumentEnds | None:
    """The ends of the documents of a .npy file with `count` tokens; None where it has no index.

    Reading them raises DataError where the index is none, or is that of other tokens.
    """
    index = file_beside(tokens, NUMPY, ENDS)
    if index is None:
        return None
    return DocumentEnds(index, _read, str(index), str(tokens), count)


def _read(path: str, index: str, tokens: str, count: int) -> np.ndarray:
    """The numbers in `path`; `index` and `tokens` are the names for messages."""
    try:
        ends = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        wrong = f"the index of document ends of {tokens} cannot be read ({first_line(error)})"
        raise DataError(f"{index}: {wrong}") from error
    if ends.ndim != 1 or ends.dtype != DTYPE or not len(ends) or ends[-1] != count or (np.diff(ends) <= 0).any():
        raise DataError(f"{index}: no index of the document ends of {tokens}, which has {count:,} tokens")
    return ends
