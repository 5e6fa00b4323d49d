"""Token ids that somebody else has written: NumPy and raw files, memory-mapped and never copied."""

import hashlib
import os

import numpy as np
from etils import epath

from hybridnorm_jax.data.sources import held_out
from hybridnorm_jax.data.windows import Extent
from hybridnorm_jax.errors import DataError

MAGIC = b"\x93NUMPY"
DTYPES = ("<u2", "<u4", "<i4")
# The unit of the split: a constant, so that the split does not depend on the length of the windows.
BLOCK_TOKENS = 65536


def open_token_file(path: epath.Path, raw_dtype: str) -> np.ndarray:
    """A memory map of a 1-D array of uint16, uint32 or int32.

    A file that begins with NumPy's magic carries its dtype; any other, whatever it is called, is raw `raw_dtype`
    (OLMo publishes raw tokens as .npy). Raises DataError where the file's size is not what its header or dtype says.
    """
    if "://" in os.fspath(path):
        raise DataError(f"{path}: token files are memory-mapped; copy it to a local disk and name that in data.files")
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if stream.read(len(MAGIC)) == MAGIC:
                dtype, count, offset = _read_header(stream, path)
                _check_size(path, size, offset, count, dtype)
            else:
                dtype, offset = np.dtype(raw_dtype), 0
                count, rest = divmod(size, dtype.itemsize)
                if rest:
                    right = f"no whole number of {dtype} tokens; the file is truncated or data.token_dtype is another"
                    raise DataError(f"{path}: {size} bytes are {right}")
            if not count:
                raise DataError(f"{path}: holds no tokens")
            return np.memmap(stream, dtype, mode="r", offset=offset, shape=(count,))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_header(stream, path: epath.Path) -> tuple[np.dtype, int, int]:
    """(dtype, number of tokens, offset of the first) of a .npy file."""
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
    return dtype, shape[0], stream.tell()


def _check_size(path: epath.Path, size: int, offset: int, count: int, dtype: np.dtype) -> None:
    promised = offset + count * dtype.itemsize
    if size < promised:
        raise DataError(f"{path}: truncated: its header promises {promised} bytes, the file has {size}")


def split_extents(arrays: dict[epath.Path, np.ndarray], fraction: float) -> tuple[tuple[Extent, ...], ...]:
    """The (train, held-out) extents of token files.

    Blocks of BLOCK_TOKENS are held out by a hash of (file name, number of the block): moving a file to another
    directory, or adding others, changes nothing.
    """
    splits: tuple[list[Extent], list[Extent]] = ([], [])
    for path, array in arrays.items():
        name, size = os.fspath(path), len(array)
        block_tokens = BLOCK_TOKENS if 0 < fraction < 1 else size
        start, side = 0, None
        for block, first in enumerate(range(0, size, block_tokens)):
            digest = hashlib.sha256(f"{path.name}:{block}".encode()).digest()
            block_side = held_out(digest, fraction)
            if side is not None and block_side != side:
                splits[side].append(Extent(array, name, start, first))
                start = first
            side = block_side
        splits[side].append(Extent(array, name, start, size))
    return tuple(map(tuple, splits))
