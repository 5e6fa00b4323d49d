"""What a file is by its first bytes, where it is not what was asked for: formats with a magic number, and text.

A wrong file should be called what it is, in the same words wherever one is read.
"""

import codecs
import enum
import os
import re
import unicodedata
from typing import NamedTuple

from etils import epath

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# No format below needs more of a file than this to be known.
START_BYTES = 1024
BOM = codecs.BOM_UTF8
# Control characters that stand in no text; text may hold tab, newline, vertical tab, form feed and carriage return.
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
# Categories of Unicode: control, surrogate, private use, unassigned.
NO_CHARACTERS = ("Cc", "Cs", "Co", "Cn")


class Kind(enum.Enum):
    """What somebody who needs what is in such a file has to do; the readers say it in their own words."""

    ARCHIVE = enum.auto()  # holds other files
    PACKED = enum.auto()  # one file, compressed
    ARRAY = enum.auto()
    TABLE = enum.auto()
    PICKLE = enum.auto()
    DOCUMENT = enum.auto()  # text with a layout
    WEIGHTS = enum.auto()


class Format(NamedTuple):
    """A format that is known by its first bytes.

    Attributes:
      name: in messages, as "a tar archive".
      kind: what to do with it.
      magic: matches the beginning of such a file. It asks for three bytes or more, so that token ids hardly ever do.
      may_begin_text: whether a text may begin like this: then it is this format only if what follows is no text.
    """

    name: str
    kind: Kind
    magic: re.Pattern[bytes]
    may_begin_text: bool = False


def _format(name: str, kind: Kind, magic: bytes, *, may_begin_text: bool = False) -> Format:
    return Format(name, kind, re.compile(magic, re.DOTALL), may_begin_text)


GZIP = _format("a file packed with gzip", Kind.PACKED, rb"\x1f\x8b\x08[\x00-\x1f]")
ZSTANDARD = _format("a file packed with zstd", Kind.PACKED, rb"(?:\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)")
BZIP2 = _format("a file packed with bzip2", Kind.PACKED, rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
XZ = _format("a file packed with xz", Kind.PACKED, rb"\xfd7zXZ\x00")
TAR = _format("a tar archive", Kind.ARCHIVE, rb".{257}ustar")
PARQUET = _format("a Parquet file", Kind.TABLE, rb"PAR1", may_begin_text=True)
ARROW_FILE = _format("an Arrow file", Kind.TABLE, rb"ARROW1", may_begin_text=True)
ARROW_STREAM = _format("an Arrow stream", Kind.TABLE, rb"\xff{4}.{2}\x00\x00\x10\x00\x00\x00")
ZIP = _format("a zip archive", Kind.ARCHIVE, rb"PK(?:\x03\x04|\x05\x06|\x07\x08)")
FORMATS = (
    GZIP,
    ZSTANDARD,
    BZIP2,
    XZ,
    _format("a file packed with lz4", Kind.PACKED, rb"(?:\x04\x22\x4d|\x02\x21\x4c)\x18"),
    _format("a file packed with compress (.Z)", Kind.PACKED, rb"\x1f\x9d\x90"),
    # Its properties, the size of its dictionary (a power of two), and its length, unknown or less than 2^40.
    _format(
        "a file packed with lzma",
        Kind.PACKED,
        rb"\x5d\x00\x00(?:[\x01\x02\x04\x08\x10\x20\x40\x80]\x00(?:\xff{8}|.{5}\x00{3})|\x00[\x01\x02\x04\x08]\xff{8})",
    ),
    _format("a file packed with lzip", Kind.PACKED, rb"LZIP\x01"),
    _format("a file packed with Snappy", Kind.PACKED, rb"\xff\x06\x00\x00sNaPpY"),
    TAR,
    ZIP,
    _format("a 7z archive", Kind.ARCHIVE, rb"7z\xbc\xaf\x27\x1c"),
    _format("a RAR archive", Kind.ARCHIVE, rb"Rar!\x1a\x07"),
    _format("a NumPy array", Kind.ARRAY, rb"\x93NUMPY"),
    PARQUET,
    ARROW_FILE,
    ARROW_STREAM,
    _format("an HDF5 file", Kind.TABLE, rb"\x89HDF"),
    _format("an SQLite database", Kind.TABLE, rb"SQLite format 3\x00"),
    _format("an Avro file", Kind.TABLE, rb"Obj\x01"),
    # Protocols 4 and 5 begin with a frame and its length. Of older ones: a list, dict, tuple or set that is noted down,
    # a class, PyTorch's number; and protocol 0, which is ASCII.
    _format(
        "a pickle, which can run any code and is never read",
        Kind.PICKLE,
        rb"\x80[\x04\x05]\x95.{5}\x00{3}|\x80[\x02\x03](?:[\]})]q[\x00\x01]|c[A-Za-z_]{3}|\x8a\x0al\xfc)|\([ld]p0\n",
    ),
    _format("a PDF file", Kind.DOCUMENT, rb"%PDF-"),
    _format("an old Word or Excel file", Kind.DOCUMENT, rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    _format("a safetensors file", Kind.WEIGHTS, rb'.{5}\x00{3}\{"[A-Za-z_.]{3}'),
    _format("a GGUF file", Kind.WEIGHTS, rb"GGUF.\x00{3}"),
)


def format_of(start: bytes) -> Format | None:
    """The format of a file with this start, of START_BYTES or more unless the file is shorter."""
    for each in FORMATS:
        if each.magic.match(start) and not (each.may_begin_text and encoding_of_text(start)):
            return each
    return None


def marked_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32, if a file begins with the byte order mark of one."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    return "UTF-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


def encoding_of_text(start: bytes) -> str | None:
    """The encoding of a file with this start if it is text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Text in UTF-8 is what decodes and holds no control character but white space. The two others decode nearly
    anything, so that every character must also be assigned, and not be for private use.
    """
    encoding = marked_encoding(start)
    if encoding and _characters(start, encoding):
        return encoding
    text = _decoded(start, "UTF-8")
    return "UTF-8" if text and not CONTROL.search(text) else None


def _characters(start: bytes, encoding: str) -> bool:
    text = _decoded(start, encoding)
    return bool(text) and all(one.isspace() or unicodedata.category(one) not in NO_CHARACTERS for one in text)


def _decoded(start: bytes, encoding: str) -> str:
    """The text, without a character that is cut at the end; nothing if it does not decode."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(start)
    except UnicodeError:
        return ""


def pointer_of_git_lfs(path: epath.PathLike, start: bytes) -> str | None:
    """What to say of what git clones without git-lfs in the place of a large file; None: the file is none."""
    if not start.startswith(LFS_POINTER):
        return None
    directory = os.path.dirname(os.fspath(path)) or "."
    return f"a pointer of git-lfs, not the file itself; run `git lfs pull` in {directory}"
