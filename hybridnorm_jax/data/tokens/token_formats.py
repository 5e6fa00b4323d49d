"""Which numbers a file of tokens holds: the formats that are read, and what is said of any other file."""

import re
import struct
import warnings
from tokenize import TokenError
from typing import BinaryIO, NamedTuple

import numpy as np

from hybridnorm_jax.config.data_file_names import PACKED_SUFFIXES
from hybridnorm_jax.data.files.companions import NUMPY, TARGETS, file_beside
from hybridnorm_jax.data.files.identity import regular_file_size
from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.data.tokens import megatron_index
from hybridnorm_jax.data.tokens.document_ends import DocumentEnds, document_ends
from hybridnorm_jax.data.tokens.megatron_index import read_megatron_index
from hybridnorm_jax.data.tokens.token_numbers import other_numbers
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.file_formats import START_BYTES, ZIP, Kind, encoding_of_text, format_of, pointer_of_git_lfs

NUMPY_MAGIC = b"\x93NUMPY"
# The header of llm.c and modded-nanogpt: 256 int32, of which the first three are magic number, version, tokens.
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
LLMC_OTHERS = {20240326: "a model", 20240327: "states for a test", 20240328: "a tokenizer", 20240522: "an evaluation"}
# Names that promise packed content, also where that is not known by its first bytes.
PACKED = (*PACKED_SUFFIXES, ".tgz", ".tar", ".zip", ".7z", ".rar", ".lz4", ".lzma", ".lz", ".z", ".br")
# Text: both bytes of a random 16-bit id are UTF-8 without control characters with a chance of 0.31 at most (ids below
# 32,512; 0.25 below 50,257). So 24 ids in a row are with less than 1e-12, and no 32-bit id below 2^24 ever is.
FEWEST_TEXT_BYTES = 48
# Token ids as JSON, CSV or one a line.
IDS_AS_TEXT = re.compile(r"[\s,;\[\]\ufeff]*[0-9][0-9\s,;\[\]\ufeff-]*")
NP_SAVE = "write its token ids with np.save"
# What to do with a file of another format.
RIGHT = {
    Kind.ARCHIVE: "unpack it, and name its files",
    Kind.PACKED: "token files are read in place; unpack it, and name the unpacked file",
    Kind.ARRAY: NP_SAVE,
    Kind.TABLE: NP_SAVE,
    Kind.PICKLE: NP_SAVE,
    Kind.DOCUMENT: "extract its text, and set data.source=text",
    Kind.WEIGHTS: "name files of token ids",
}


class Layout(NamedTuple):
    """What a file holds: `count` tokens from byte `offset` on.

    Attributes:
      is_raw: whether data.token_dtype alone says of what dtype they are.
      ends: where its documents end, if an index beside it says so.
      targets: the file beside it that says which tokens are learned; None: all are.
    """

    dtype: np.dtype
    count: int
    offset: int
    is_raw: bool = False
    ends: DocumentEnds | None = None
    targets: Place | None = None


def read_layout(path: Place, raw_dtype: str) -> Layout:
    """The layout of a file of tokens.

    A file that begins with NumPy's magic number or with llm.c's header carries its dtype, and Megatron's index beside a
    .bin file says it. Any other, whatever it is called, is raw `raw_dtype`: OLMo publishes raw tokens as .npy.

    Raises:
      DataError: the file cannot be read, is something else, holds no tokens, or its size is not what its header or
        dtype says.
    """
    size = regular_file_size(path)
    try:
        with open(readable(path), "rb") as stream:
            layout = _layout(stream, path, size, np.dtype(raw_dtype))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if layout.count <= 0:
        raise DataError(f"{path}: holds no tokens")
    return layout


def _layout(stream: BinaryIO, path: Place, size: int, raw_dtype: np.dtype) -> Layout:
    start = stream.read(max(LLMC_HEADER_BYTES, START_BYTES))
    if start.startswith(NUMPY_MAGIC):
        return _numpy_layout(stream, path, size)
    _refuse_others(path, start)
    layout = _llmc_layout(path, start)
    if layout is not None:
        return _exactly(path, size, layout, "its llm.c header")
    if index := read_megatron_index(path):
        return Layout(index.dtype, index.count, offset=0, ends=index.ends)
    count, rest = divmod(size, raw_dtype.itemsize)
    if rest:
        right = f"no whole number of {raw_dtype} tokens; the file is truncated or data.token_dtype is another"
        raise DataError(f"{path}: {size} bytes are {right}")
    _check_raw_dtype(stream, path, size, raw_dtype)
    return Layout(raw_dtype, count, offset=0, is_raw=True)


def _llmc_layout(path: Place, start: bytes) -> Layout | None:
    """What the header of llm.c promises; None if the file begins with none."""
    magic = int.from_bytes(start[:4], "little")
    if magic in LLMC_OTHERS:
        raise DataError(f"{path}: a file of llm.c that holds {LLMC_OTHERS[magic]}, not tokens")
    if magic not in {known for known, _ in LLMC_DTYPES}:
        return None
    if len(start) < LLMC_HEADER_BYTES:
        wrong = f"its llm.c header has {LLMC_HEADER_BYTES} bytes, but the file has {len(start)}"
        raise DataError(f"{path}: truncated: {wrong}; get the whole file")
    _, version, count = struct.unpack("<3i", start[:12])
    if (magic, version) not in LLMC_DTYPES:
        right = "known are 1 of 20240520 and 7 of 20240801"
        raise DataError(f"{path}: version {version} of llm.c's format {magic} of token files is not known; {right}")
    return Layout(np.dtype(LLMC_DTYPES[magic, version]), count, LLMC_HEADER_BYTES)


def _numpy_layout(stream: BinaryIO, path: Place, size: int) -> Layout:
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
    layout = Layout(
        dtype,
        count=shape[0],
        offset=stream.tell(),
        ends=document_ends(path, shape[0]),
        targets=file_beside(path, NUMPY, TARGETS),
    )
    return _exactly(path, size, layout, "its header")


def _exactly(path: Place, size: int, layout: Layout, header: str) -> Layout:
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


def _refuse_others(path: Place, start: bytes) -> None:
    """Raise DataError for what is no raw token file by its first bytes or its name."""
    if start.startswith((megatron_index.MAGIC, megatron_index.OLD_MAGIC)):
        raise DataError(f"{path}: the index of Megatron's tokens, not the tokens; name its .bin file only")
    if pointer := pointer_of_git_lfs(path, start):
        raise DataError(f"{path}: {pointer}")
    found = format_of(start)
    if found == ZIP:
        right = "take the array out of it and write it with np.save"
        raise DataError(f"{path}: a zip archive, such as np.savez writes; {right}")
    if found:
        raise DataError(f"{path}: {found.name}; {RIGHT[found.kind]}")
    if path.name.lower().endswith(PACKED):
        raise DataError(f"{path}: {RIGHT[Kind.PACKED]}")
    encoding = encoding_of_text(start) if len(start) >= FEWEST_TEXT_BYTES else None
    if encoding == "UTF-8" and IDS_AS_TEXT.fullmatch(start.decode(errors="replace")):
        raise DataError(f"{path}: is text in UTF-8 that spells token ids; read them, and write them with np.save")
    if encoding:
        converted = "" if encoding == "UTF-8" else f"convert it (iconv -f {encoding} -t UTF-8), and "
        raise DataError(f"{path}: is text in {encoding}, not token ids; {converted}set data.source=text")


def _check_raw_dtype(stream: BinaryIO, path: Place, size: int, dtype: np.dtype) -> None:
    """Raise DataError if sampled numbers show that they are no numbers of `dtype`."""
    if found := other_numbers(stream, size, dtype):
        wrong, right = found
        raise DataError(f"{path}: {wrong}; {right} (a .npy file that np.save has written carries its dtype)")
