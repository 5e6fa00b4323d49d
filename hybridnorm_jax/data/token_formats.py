"""Which numbers a file of tokens holds: the formats that are read, and what is said of any other file."""

import struct
import warnings
import zipfile
from tokenize import TokenError
from typing import BinaryIO, NamedTuple

import numpy as np
from etils import epath

from hybridnorm_jax.data.identity import regular_file_size
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.whole_files import is_local

NUMPY_MAGIC = b"\x93NUMPY"
# The header of llm.c and modded-nanogpt: 256 int32, of which the first three are magic number, version, tokens.
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
LLMC_OTHERS = {20240326: "a model", 20240327: "states for a test", 20240328: "a tokenizer", 20240522: "an evaluation"}
MEGATRON_MAGICS = (b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00")
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
# What raw numbers of one dtype are when they are read as another; int32 without negative numbers is uint32.
RAW_NAMES = {"int32": "uint32"}
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")
SAMPLES = 16
SAMPLE_BYTES = 4096
# High halves of the ids of the largest vocabularies: below a million.
LARGEST_HIGH_HALF = 15
FEWEST_SAMPLED = 16


class Layout(NamedTuple):
    """What a file holds: `count` tokens from byte `offset` on."""

    dtype: np.dtype
    count: int
    offset: int


def read_layout(path: epath.Path, raw_dtype: str) -> Layout:
    """The layout of a file of tokens.

    A file that begins with NumPy's magic number or with llm.c's header carries its dtype. Any other, whatever it is
    called, is raw `raw_dtype`: OLMo publishes raw tokens as .npy.

    Raises:
      DataError: the file cannot be read, is something else, holds no tokens, or its size is not what its header or
        dtype says.
    """
    if not is_local(path):
        raise DataError(f"{path}: token files are read in place; copy it to a local disk and name that in data.files")
    size = regular_file_size(path)
    try:
        with open(path, "rb") as stream:
            layout = _layout(stream, path, size, np.dtype(raw_dtype))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if layout.count <= 0:
        raise DataError(f"{path}: holds no tokens")
    return layout


def _layout(stream: BinaryIO, path: epath.Path, size: int, raw_dtype: np.dtype) -> Layout:
    start = stream.read(LLMC_HEADER_BYTES)
    if start.startswith(NUMPY_MAGIC):
        return _numpy_layout(stream, path, size)
    _refuse_others(path, start)
    if len(start) >= 12:
        magic, version, count = struct.unpack("<3i", start[:12])
        if (magic, version) in LLMC_DTYPES and len(start) == LLMC_HEADER_BYTES:
            layout = Layout(np.dtype(LLMC_DTYPES[magic, version]), count, LLMC_HEADER_BYTES)
            return _exactly(path, size, layout, "its llm.c header")
        if magic in {known for known, _ in LLMC_DTYPES}:
            right = "known are 1 of 20240520 and 7 of 20240801"
            raise DataError(f"{path}: version {version} of llm.c's format {magic} of token files is not known; {right}")
        if magic in LLMC_OTHERS:
            raise DataError(f"{path}: a file of llm.c that holds {LLMC_OTHERS[magic]}, not tokens")
    _check_megatron(path, raw_dtype)
    count, rest = divmod(size, raw_dtype.itemsize)
    if rest:
        right = f"no whole number of {raw_dtype} tokens; the file is truncated or data.token_dtype is another"
        raise DataError(f"{path}: {size} bytes are {right}")
    _check_raw_dtype(stream, path, size, raw_dtype)
    return Layout(raw_dtype, count, offset=0)


def _numpy_layout(stream: BinaryIO, path: epath.Path, size: int) -> Layout:
    stream.seek(0)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings(action="ignore"):  # of headers that Python 2 wrote
            shape, _, dtype = read(stream)
    # NumPy parses the header as a Python literal, and lets more than ValueError out of it.
    except (ValueError, TypeError, SyntaxError, LookupError, RecursionError, MemoryError, TokenError) as error:
        raise DataError(f"{path}: its NumPy header is damaged or truncated") from error
    if len(shape) != 1 or dtype.kind not in "iu":
        known = "a 1-D array of integers, such as np.save(FILE, np.array(ids, dtype=np.uint16))"
        raise DataError(f"{path}: holds {dtype} of shape {shape}, but tokens must be {known}")
    return _exactly(path, size, Layout(dtype, count=shape[0], offset=stream.tell()), "its header")


def _exactly(path: epath.Path, size: int, layout: Layout, header: str) -> Layout:
    """The layout, if the file is as long as its header promises."""
    if layout.count < 0:
        raise DataError(f"{path}: {header} is damaged: it promises {layout.count} tokens")
    promised = layout.offset + layout.count * layout.dtype.itemsize
    if size < promised:
        raise DataError(f"{path}: truncated: {header} promises {promised} bytes, the file has {size}")
    if size > promised:
        wrong = f"{size - promised} bytes follow the {layout.count} tokens that {header} promises"
        right = "if several files were joined byte by byte, name each of them in data.files instead"
        raise DataError(f"{path}: {wrong}; {right}")
    return layout


def _refuse_others(path: epath.Path, start: bytes) -> None:
    """Raise DataError for what is no raw token file by its name or its first bytes."""
    name = path.name.lower()
    if start.startswith(MEGATRON_MAGICS):
        raise DataError(f"{path}: the index of Megatron's tokens, not the tokens; name its .bin file only")
    if start.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        right = "take the array out of it and write it with np.save"
        raise DataError(f"{path}: a zip archive, such as np.savez writes; {right}")
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a pointer of Git LFS, not the file itself; fetch that with git lfs pull")
    if name.endswith(PACKED):
        raise DataError(f"{path}: token files are read in place; unpack it, and name the unpacked file")
    # Both bytes of every token printable: that is text.
    if len(start) > 32 and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        raise DataError(f"{path}: is text, not token ids; set data.source=text")


def _check_megatron(path: epath.Path, raw_dtype: np.dtype) -> None:
    """Raise DataError if Megatron's index beside the file says that its numbers are others than `raw_dtype`."""
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return
    start = index.read_bytes() if regular_file_size(index) < 34 else _first_bytes(index, 34)
    magic = MEGATRON_MAGICS[0]
    # After the magic number: version (uint64), code of the dtype (uint8).
    if not start.startswith(magic) or len(start) < len(magic) + 9:
        return
    dtype = MEGATRON_DTYPES.get(start[len(magic) + 8], "unknown")
    needed = RAW_NAMES.get(dtype, dtype)
    if needed == raw_dtype.name:
        return
    readable = needed in ("uint16", "uint32")
    right = f"set data.token_dtype={needed}" if readable else "write them as uint16 or uint32"
    raise DataError(f"{path}: {index.name} beside it says that its tokens are {dtype}, not {raw_dtype}; {right}")


def _first_bytes(path: epath.Path, count: int) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(count)


def _check_raw_dtype(stream: BinaryIO, path: epath.Path, size: int, dtype: np.dtype) -> None:
    """Raise DataError if sampled numbers show that they are of another width than `dtype`.

    Of 32-bit ids the upper halves are tiny, of 64-bit ids also the upper words are 0. 16-bit ids read as 32-bit ones
    are beyond every vocabulary.
    """
    words = _sample(stream, size).reshape(-1, 4)
    if words.size < FEWEST_SAMPLED:
        return
    upper_halves, lower_halves = words[:, 1::2], words[:, ::2]
    wide = not words[:, 2:].any() and words[:, 0].any() and words[:, 1].max() <= LARGEST_HIGH_HALF
    wide &= bool((words[:, 0] != 0).mean() > 0.5)
    double = upper_halves.max() <= LARGEST_HIGH_HALF < lower_halves.max()
    double |= not upper_halves.any() and bool((lower_halves != 0).mean() > 0.5)
    carries = "a .npy file that np.save has written carries its dtype"
    if wide:
        raise DataError(f"{path}: its numbers look like 64-bit ones, not {dtype}; write uint16 or uint32 ({carries})")
    if dtype.itemsize == 2 and double:
        wrong = "read as uint16, every second token is 0 or tiny: its numbers look like 32-bit ones"
        raise DataError(f"{path}: {wrong}; set data.token_dtype=uint32 ({carries})")
    if dtype.itemsize == 4 and (upper_halves > 255).mean() > 0.5:
        wrong = "read as uint32, most tokens are above 16 million: its numbers look like 16-bit ones"
        raise DataError(f"{path}: {wrong}; set data.token_dtype=uint16 ({carries})")


def _sample(stream: BinaryIO, size: int) -> np.ndarray:
    """16-bit numbers of stretches spread evenly over the file, each from a multiple of 8 bytes on."""
    last = max(size - SAMPLE_BYTES, 0)
    pieces = []
    for start in sorted({int(place) // 8 * 8 for place in np.linspace(0, last, SAMPLES)}):
        stream.seek(start)
        piece = stream.read(SAMPLE_BYTES)
        pieces.append(np.frombuffer(piece[: len(piece) // 8 * 8], "<u2"))
    return np.concatenate(pieces)
