"""The content of files that may be packed, in chunks, and bounded: a small file may unpack to one without end."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import zstandard

from hybridnorm_jax.config.data_file_names import PACKED_SUFFIXES
from hybridnorm_jax.data.files.identity import regular_file_size
from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.file_formats import BZIP2, GZIP, START_BYTES, XZ, ZSTANDARD, Format, format_of, pointer_of_git_lfs

CHUNK_BYTES = 1 << 20
# A packed file may unpack to this many bytes for each of its own, on top of a number that every file may have. Text
# packs to a tenth, logs to a hundredth.
MOST_TIMES = 200
ALWAYS_ALLOWED = 256 << 20
# The window that a frame of Zstandard may ask for: 2 GiB, the format's largest that `zstd --long=31` writes.
MAX_WINDOW_BYTES = 1 << 31
# Zstandard has no limit to what one call unpacks; 4 bytes can stand for 128 KiB, so this many for 64 MiB.
ZSTANDARD_PIECE_BYTES = 2048


class _Packing(NamedTuple):
    """One way of packing: the format, the ends of names that promise it, and who unpacks one stream of it."""

    format: Format
    suffixes: tuple[str, ...]
    unpacker: Callable[[], Any]


def _gzip() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


class _ZstandardUnpacker:
    """One frame of Zstandard, with the interface of zlib's object: what is unpacked at once is bounded."""

    def __init__(self):
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        self.unconsumed_tail = b""
        self.unused_data = b""

    @property
    def eof(self) -> bool:
        return self._frame.eof

    def decompress(self, piece: bytes, max_length: int) -> bytes:
        """Unpack the first of `piece`, to about max_length; the others become unconsumed_tail, or unused_data."""
        unpacked = []
        length = place = 0
        while length < max_length and place < len(piece) and not self.eof:
            unpacked.append(self._frame.decompress(piece[place : place + ZSTANDARD_PIECE_BYTES]))
            length += len(unpacked[-1])
            place += ZSTANDARD_PIECE_BYTES
        rest = piece[place:]
        self.unconsumed_tail = b"" if self.eof else rest
        self.unused_data = self._frame.unused_data + rest if self.eof else b""
        return b"".join(unpacked)


PACKINGS = (
    _Packing(GZIP, (".gz", ".gzip"), _gzip),
    _Packing(ZSTANDARD, (".zst", ".zstd"), _ZstandardUnpacker),
    _Packing(BZIP2, (".bz2",), bz2.BZ2Decompressor),
    _Packing(XZ, (".xz",), lzma.LZMADecompressor),
)


def plain_name(name: str) -> str:
    """A file's name in lower case, without the end that says how it is packed."""
    name = name.lower()
    ends = (suffix for suffix in PACKED_SUFFIXES if name.endswith(suffix))
    return name.removesuffix(next(ends, ""))


def chunks(path: Place) -> Iterator[bytes]:
    """A file's content, unpacked, in pieces of about CHUNK_BYTES.

    Raises:
      DataError: it cannot be read, is no regular file, is a pointer of git-lfs, is damaged or truncated, or unpacks to
        far more than text does.
    """
    size = regular_file_size(path)
    try:
        with open(readable(path), "rb") as stream:
            start = stream.read(CHUNK_BYTES)
            packing = _packing(path, start)
            raw = _raw_chunks(stream, start)
            if packing is None:
                yield from raw
            else:
                yield from _bounded(path, _unpacked(raw, packing.unpacker), size)
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or truncated archive ({error})") from error
    except MemoryError as error:
        raise DataError(f"{path}: unpacking it needs more memory than there is; unpack it first") from error
    except OSError as error:
        # bz2 raises OSError without a number for damaged data.
        kind = "damaged or truncated archive" if error.errno is None else "cannot be read"
        raise DataError(f"{path}: {kind} ({error.strerror or error})") from error


def is_packed(path: Place) -> bool:
    """Whether a regular file is packed, by its first bytes."""
    with open(readable(path), "rb") as stream:
        found = format_of(stream.read(START_BYTES))
    return any(found == packing.format for packing in PACKINGS)


def _packing(path: Place, start: bytes) -> _Packing | None:
    """How a file with this start is packed: its content says so, and its name must not say otherwise."""
    if pointer := pointer_of_git_lfs(path, start):
        raise DataError(f"{path}: {pointer}")
    found = format_of(start)
    for packing in PACKINGS:
        if start and path.name.lower().endswith(packing.suffixes) and packing.format != found:
            is_what = f"it is {found.name}" if found else f"it is not {packing.format.name}"
            raise DataError(f"{path}: damaged or truncated archive: by its content {is_what}; mend its name")
    return next((packing for packing in PACKINGS if packing.format == found), None)


def _raw_chunks(stream: BinaryIO, start: bytes) -> Iterator[bytes]:
    chunk = start
    while chunk:
        yield chunk
        chunk = stream.read(CHUNK_BYTES)


def _unpacked(raw: Iterator[bytes], unpacker: Callable[[], Any]) -> Iterator[bytes]:
    """Streams packed one after the other. Zeros after the last one are padding, as tar and tapes write it."""
    current = None
    for piece in raw:
        while piece:
            if current is None:
                piece = piece.lstrip(b"\x00")
                if not piece:
                    break
                current = unpacker()
            yield from _one_piece(current, piece)
            piece = b""
            if current.eof:
                piece, current = current.unused_data, None
    if current is not None:
        raise EOFError("it ends inside a stream")


def _one_piece(current: Any, piece: bytes) -> Iterator[bytes]:
    """What one piece unpacks to. A piece of a bomb unpacks to thousands of times as much: never all of it at once."""
    if isinstance(current, bz2.BZ2Decompressor | lzma.LZMADecompressor):
        while not current.eof:
            unpacked = current.decompress(piece, max_length=CHUNK_BYTES)
            piece = b""
            if unpacked:
                yield unpacked
            elif current.needs_input or current.eof:
                return
        return
    while piece and not current.eof:
        yield current.decompress(piece, CHUNK_BYTES)
        piece = current.unconsumed_tail


def _bounded(path: Place, unpacked: Iterator[bytes], size: int) -> Iterator[bytes]:
    """What is unpacked, as long as it is not far more than text of `size` packed bytes could be."""
    most = ALWAYS_ALLOWED + MOST_TIMES * size
    total = 0
    for chunk in unpacked:
        total += len(chunk)
        if total > most:
            wrong = f"its {size} bytes unpack to more than {most} bytes, which no text does"
            raise DataError(f"{path}: {wrong}; if that is meant, unpack it, and name the unpacked file")
        yield chunk
