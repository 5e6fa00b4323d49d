"""Where the documents of a file of tokens end: an index beside the file, so that nobody has to look for separators.

    train-00000.npy       the tokens of whole documents, one after the other
    train-00000.ends.npy  the index: a 1-D .npy of little-endian uint64, ascending

`ends[i]` is the place behind the last token of document i, counted from the first token of the file. So document i is
tokens [ends[i - 1], ends[i]), the first one from 0 on, and the last end is the number of tokens. A separator belongs to
the document that it ends. A document that is held out in blocks counts as several: what lies between two of its
held-out blocks is one, as in the tokens, where a separator ends each of them.
"""

import os
import pathlib

import numpy as np

from hybridnorm_jax.errors import DataError

DTYPE = np.dtype("<u8")
SUFFIX = ".ends.npy"


def ends_path(tokens: str | os.PathLike[str]) -> pathlib.Path:
    """The index that belongs to a file of tokens: NAME.ends.npy beside NAME.npy."""
    path = pathlib.Path(tokens)
    return path.with_name(path.name.removesuffix(".npy") + SUFFIX)


def open_document_ends(tokens: str | os.PathLike[str], count: int) -> np.ndarray:
    """The ends of the documents of a file with `count` tokens, mapped into memory and read when they are asked for.

    Raises:
      DataError: there is no index, it is none, or it is that of another number of tokens.
    """
    path = ends_path(tokens)
    try:
        ends = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the index of document ends of {tokens} cannot be read ({error})") from error
    if ends.ndim != 1 or ends.dtype != DTYPE or not len(ends) or ends[-1] != count:
        raise DataError(f"{path}: no index of the document ends of {tokens}, which has {count:,} tokens")
    return ends
