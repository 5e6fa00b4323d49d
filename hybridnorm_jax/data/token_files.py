"""Token ids that somebody else has written: NumPy and raw files, memory-mapped and never copied."""

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np
from etils import epath

from hybridnorm_jax.data.sources import held_out
from hybridnorm_jax.data.windows import Extent
from hybridnorm_jax.errors import DataError

MAGIC = b"\x93NUMPY"
DTYPES = ("<u2", "<u4", "<i4")
# The unit of the split: a constant, so that the split does not depend on the length of the windows.
BLOCK_TOKENS = 65536


class SplitExtents(NamedTuple):
    """The two parts of token files."""

    train: tuple[Extent, ...]
    held_out: tuple[Extent, ...]


class _Layout(NamedTuple):
    """What a file holds: `count` tokens from byte `offset` on."""

    dtype: np.dtype
    count: int
    offset: int


class _Stretch(NamedTuple):
    """Tokens [start, stop) of a file, all on one side of the split."""

    start: int
    stop: int
    is_held_out: bool


def open_token_file(path: epath.Path, raw_dtype: str) -> np.ndarray:
    """A memory map of a 1-D array of uint16, uint32 or int32.

    A file that begins with NumPy's magic carries its dtype. Any other, whatever it is called, is raw `raw_dtype`: OLMo
    publishes raw tokens as .npy.

    Raises:
      DataError: the file cannot be read, holds no tokens, or its size is not what its header or dtype says.
    """
    if "://" in os.fspath(path):
        raise DataError(f"{path}: token files are memory-mapped; copy it to a local disk and name that in data.files")
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            has_header = stream.read(len(MAGIC)) == MAGIC
            layout = _read_header(stream, path, size) if has_header else _raw_layout(path, size, np.dtype(raw_dtype))
            if not layout.count:
                raise DataError(f"{path}: holds no tokens")
            return np.memmap(stream, layout.dtype, mode="r", offset=layout.offset, shape=(layout.count,))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_header(stream: BinaryIO, path: epath.Path, size: int) -> _Layout:
    """The layout of a .npy file of this size."""
    stream.seek(0)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{path}: its NumPy header is damaged or truncated") from error
    if len(shape) != 1 or dtype.str not in DTYPES:
        known = "a 1-D array of uint16, uint32 or int32"
        raise DataError(f"{path}: holds {dtype} of shape {shape}, but tokens must be {known}")
    layout = _Layout(dtype, count=shape[0], offset=stream.tell())
    promised = layout.offset + layout.count * dtype.itemsize
    if size < promised:
        raise DataError(f"{path}: truncated: its header promises {promised} bytes, the file has {size}")
    return layout


def _raw_layout(path: epath.Path, size: int, dtype: np.dtype) -> _Layout:
    """The layout of a file of nothing but tokens."""
    count, rest = divmod(size, dtype.itemsize)
    if rest:
        right = f"no whole number of {dtype} tokens; the file is truncated or data.token_dtype is another"
        raise DataError(f"{path}: {size} bytes are {right}")
    return _Layout(dtype, count, offset=0)


def split_extents(arrays: Mapping[epath.Path, np.ndarray], fraction: float) -> SplitExtents:
    """The training and the held-out parts of token files.

    Blocks of BLOCK_TOKENS are held out by a hash of (file name, number of the block): moving a file to another
    directory, or adding others, changes nothing.
    """
    train: list[Extent] = []
    held_out: list[Extent] = []
    for path, array in arrays.items():
        for stretch in _stretches(path.name, len(array), fraction):
            part = held_out if stretch.is_held_out else train
            part.append(Extent(array, name=os.fspath(path), start=stretch.start, stop=stretch.stop))
    return SplitExtents(tuple(train), tuple(held_out))


def _stretches(name: str, size: int, fraction: float) -> Iterator[_Stretch]:
    """A file's tokens, neighbouring blocks of one side joined."""
    block_tokens = BLOCK_TOKENS if 0 < fraction < 1 else size

    def is_held_out(block: int) -> bool:
        return held_out(hashlib.sha256(f"{name}:{block}".encode()).digest(), fraction)

    blocks = range(math.ceil(size / block_tokens))
    for side, neighbours in itertools.groupby(blocks, key=is_held_out):
        first, *others = neighbours
        last = others[-1] if others else first
        yield _Stretch(first * block_tokens, min((last + 1) * block_tokens, size), side)
