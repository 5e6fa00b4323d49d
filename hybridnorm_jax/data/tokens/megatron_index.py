"""Megatron's index (.idx) of a file of tokens (.bin): their type, and where the documents end.

Little-endian: 9 bytes "MMIDIDX" and two zeros, the version 1 (uint64), a code of the type (uint8), the number of
sequences S and of document marks D (uint64 each); then the length of each sequence (S int32), the byte at which it
begins (S int64), and the sequence with which each document begins, and at last S (D int64). What may follow, one byte a
sequence, is for other models.
"""

import struct
from typing import BinaryIO, NamedTuple

import numpy as np
from etils import epath

from hybridnorm_jax.data.files.companions import INDEX, RAW, file_beside
from hybridnorm_jax.data.files.identity import regular_file_size
from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.data.tokens.document_ends import DTYPE, DocumentEnds
from hybridnorm_jax.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
# Of an older format, whose files have the extension .bin too.
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
VERSION = 1


class MegatronIndex(NamedTuple):
    """What an index says: the dtype of the tokens, their number, and where documents end."""

    dtype: np.dtype
    count: int
    ends: DocumentEnds


class _Header(NamedTuple):
    dtype: np.dtype
    sequences: int
    marks: int


def read_megatron_index(tokens: Place) -> MegatronIndex | None:
    """The index beside a file NAME.bin; None where there is no NAME.idx.

    Raises:
      DataError: it is no index of Megatron's, damaged, of another version, or its tokens are no integers; or the .bin
        file has another size.
    """
    index = file_beside(tokens, RAW, INDEX) if tokens.name.endswith(RAW) else None
    if index is None:
        return None
    size = regular_file_size(index)
    try:
        with open(readable(index), "rb") as stream:
            header = _header(stream, index)
            count = _count(stream, index, size, header, tokens)
    except OSError as error:
        raise DataError(f"{index}: cannot be read ({error.strerror or error})") from error
    return MegatronIndex(header.dtype, count, DocumentEnds(index, _read_ends, count))


def _header(stream: BinaryIO, index: Place) -> _Header:
    start = stream.read(HEADER.size)
    if start.startswith(OLD_MAGIC):
        right = "write both files again with a newer Megatron, or the tokens with np.save"
        raise DataError(f"{index}: an index of Megatron's older format TNTIDX, which is not read; {right}")
    if not MAGIC.startswith(start[: len(MAGIC)]):
        bin_name = index.name.removesuffix(INDEX) + RAW
        right = f"get it again; or, if {bin_name} holds raw numbers, move {index.name} away"
        raise DataError(f"{index}: no index of Megatron's, so nothing says what {bin_name} holds; {right}")
    if len(start) < HEADER.size:
        raise DataError(f"{index}: truncated: Megatron's index begins with {HEADER.size} bytes; get the whole file")
    _, version, code, sequences, marks = HEADER.unpack(start)
    if version != VERSION:
        raise DataError(f"{index}: version {version} of Megatron's index is not known, only {VERSION}")
    dtype = DTYPES.get(code)
    if dtype is None or np.dtype(dtype).kind not in "iu":
        what = "floats" if dtype else f"of a type that is not known ({code})"
        raise DataError(f"{index}: says that its tokens are {what}; token ids are integers")
    return _Header(np.dtype(dtype), sequences, marks)


def _count(stream: BinaryIO, index: Place, size: int, header: _Header, tokens: Place) -> int:
    """The number of tokens, after the sizes of both files and the last entries are found to agree."""
    least = _offset_of_marks(header) + 8 * header.marks
    if not header.sequences or header.marks < 2 or size not in (least, least + header.sequences):
        wrong = f"promises {header.sequences:,} sequences and {header.marks:,} marks of documents"
        raise DataError(f"{index}: damaged or truncated: it {wrong}, but has {size:,} bytes; get the whole file")
    stream.seek(HEADER.size + 4 * (header.sequences - 1))
    (length,) = struct.unpack("<i", stream.read(4))
    stream.seek(_offset_of_marks(header) - 8)
    (begin,) = struct.unpack("<q", stream.read(8))
    promised, found = begin + length * header.dtype.itemsize, regular_file_size(tokens)
    if promised != found:
        right = "the two belong together: get both again"
        raise DataError(f"{tokens}: has {found:,} bytes, but {index.name} beside it says {promised:,}; {right}")
    return found // header.dtype.itemsize


def _offset_of_marks(header: _Header) -> int:
    return HEADER.size + 12 * header.sequences


def _read_ends(index: str, count: int) -> np.ndarray:
    """The place behind the last token of every document, in tokens."""
    with open(index, "rb") as stream:
        header = _header(stream, epath.Path(index))
        lengths = np.fromfile(stream, "<i4", header.sequences)
        begins = np.fromfile(stream, "<i8", header.sequences)
        marks = np.fromfile(stream, "<i8", header.marks)
    ends = np.cumsum(lengths, dtype=np.int64)
    is_whole = (
        len(marks) == header.marks
        and (lengths >= 0).all()
        and ends[-1] == count
        and (begins == (ends - lengths) * header.dtype.itemsize).all()
        and marks[0] == 0
        and marks[-1] == header.sequences
        and (np.diff(marks) >= 0).all()
    )
    if not is_whole:
        raise DataError(f"{index}: damaged: its sequences and documents do not follow each other; make it again")
    found = ends[marks[1:][np.diff(marks) > 0] - 1]
    return found[np.diff(found, prepend=0) > 0].astype(DTYPE)  # without empty documents
