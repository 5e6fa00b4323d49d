"""Text on disk as a stream of documents, and the rule that holds some of them out.

A document is a whole text file, or one line of a .jsonl file. Its identity, whose hash decides the split, is

- for the standard library, the path relative to the library: the same file has the same fate in every Python;
- for any other file, the text itself: moving, renaming or reordering files changes nothing, and two copies of a text
  never fall on both sides of the split.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import pathlib
import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard
from etils import epath

from hybridnorm_jax.errors import DataError

CHUNK_BYTES = 1 << 20
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, its length in UTF-8 bytes, and the SHA-256 of its identity."""

    text: str
    num_bytes: int
    digest: bytes


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file and, where it is the path that identifies its document, that path (None: the text does)."""

    path: epath.Path
    identity: str | None = None

    def signature(self) -> list:
        """[name, size in bytes, time of last change], which differs once the file was written again."""
        if "://" in os.fspath(self.path):
            stat = self.path.stat()
            return [os.fspath(self.path), stat.length, stat.mtime]
        stat = os.stat(self.path)
        return [self.identity or os.path.abspath(self.path), stat.st_size, stat.st_mtime_ns]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text files in the order they are read; `name` is for people, `text_field` for .jsonl records."""

    name: str
    files: tuple[TextFile, ...]
    text_field: str = "text"

    def documents(self, file: TextFile) -> Iterator[Document]:
        """The documents of one of the files.

        Raises:
          DataError: it cannot be read or holds no text.
        """
        found = False
        for text, data in _texts(file.path, self.text_field):
            if not text or text.isspace():
                continue
            found = True
            identity = data if file.identity is None else file.identity.encode()
            yield Document(text, len(data), hashlib.sha256(identity).digest())
        # The standard library has empty __init__.py files; anybody else's empty file is a mistake.
        if not found and file.identity is None:
            raise DataError(f"{file.path}: holds no text; remove it from data.files or data.validation")


def held_out(digest: bytes, fraction: float) -> bool:
    """Whether an identity with this SHA-256 digest belongs to the held-out `fraction`."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def find_files(key: str, patterns: Iterable[str]) -> tuple[epath.Path, ...]:
    """The files that paths and glob patterns name, each once, those of one pattern sorted.

    Raises:
      DataError: a directory, or a name without a file; the message names `key`.
    """
    found: dict[epath.Path, None] = {}
    for pattern in patterns:
        path = epath.Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(f"{key}: {pattern} is a directory; name its files, such as {path / '*.txt'}")
        matches = [path] if path.exists() else _glob(os.fspath(path))
        if not matches:
            raise DataError(f"{key}: no such file: {pattern}")
        found.update(dict.fromkeys(matches))
    return tuple(found)


def _glob(pattern: str) -> list[epath.Path]:
    if "://" not in pattern:
        matches = [epath.Path(match) for match in glob.glob(pattern, recursive=True)]
    else:
        path = epath.Path(pattern)
        matches = list(path.parent.glob(path.name))
    return sorted(match for match in matches if not match.is_dir())


def text_corpus(key: str, patterns: Iterable[str], text_field: str) -> Corpus:
    """Any text files: .jsonl is one document per line, everything else one per file; .gz and .zst are unpacked."""
    files = tuple(TextFile(path) for path in find_files(key, patterns))
    name = "1 text file" if len(files) == 1 else f"{len(files)} text files"
    return Corpus(name, files, text_field)


def stdlib_corpus() -> Corpus:
    """The sources of the running Python's standard library without its tests, in an order that mixes subjects."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in NOT_STDLIB]
        paths = [pathlib.Path(directory, name) for name in names if name.endswith(".py")]
        files += [TextFile(epath.Path(path), path.relative_to(root).as_posix()) for path in paths]
    if not files:
        raise DataError(f"data.source=stdlib: no .py files under {root}; set data.source=text and data.files")
    files.sort(key=lambda file: hashlib.sha256(file.identity.encode()).digest())
    name = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    return Corpus(name, tuple(files))


def _texts(path: epath.Path, text_field: str) -> Iterator[tuple[str, bytes]]:
    """Every text of a file, as a string and in UTF-8."""
    plain_name = path.name.removesuffix(".gz").removesuffix(".zst")
    if not plain_name.endswith(".jsonl"):
        data = b"".join(_chunks(path))
        yield _decode(data, path, 0), data
        return
    offset = 0
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        if not line.isspace():
            text = _record_text(_decode(line, path, offset), f"{path}:{number}", text_field)
            yield text, _encode(text, f"{path}:{number}")
        offset += len(line)


def _chunks(path: epath.Path) -> Iterator[bytes]:
    """A file's content, unpacked."""
    try:
        with path.open("rb") as stream:
            if path.name.endswith(".zst"):
                yield from _unpack_zst(stream)
            else:
                plain = gzip.GzipFile(fileobj=stream) if path.name.endswith(".gz") else stream
                while chunk := plain.read(CHUNK_BYTES):
                    yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or truncated archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _unpack_zst(stream: BinaryIO) -> Iterator[bytes]:
    """Zstandard frames one after the other. `ZstdDecompressor.stream_reader` would take a truncated file for whole."""
    unpacker = None
    while chunk := stream.read(CHUNK_BYTES):
        while chunk:
            unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
            yield unpacker.decompress(chunk)
            chunk = unpacker.unused_data
            if unpacker.eof:
                unpacker = None
    if unpacker:
        raise EOFError("it ends inside a frame")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their newline, the last one perhaps without."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _decode(data: bytes, path: epath.Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {offset + error.start}; convert the file to UTF-8") from error


def _encode(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the text holds half of a surrogate pair ({error.object[error.start]!r})") from error


def _record_text(line: str, place: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict) or text_field not in record:
        fields = f"; it has: {', '.join(record)}" if isinstance(record, dict) else "; it is no object"
        raise DataError(f"{place}: the record has no field {text_field!r} (data.text_field){fields}")
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise DataError(f"{place}: field {text_field!r} (data.text_field) must hold a string, not {kind}")
    return record[text_field]
