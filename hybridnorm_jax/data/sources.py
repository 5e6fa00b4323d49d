"""Text on disk as a stream of documents, and the identity whose hash decides which of them are held out.

A document is a whole text file, or one record of a file of JSON. Its identity is

- for the standard library, the path relative to the library: the same file has the same fate in every Python;
- for any other text, the text itself: moving, renaming or reordering files changes nothing, and two copies of a text
  never fall on both sides of the split.

Where few files are given, and wherever a file is long, what is held out are blocks of a file's lines, by their text.
"""

import dataclasses
import functools
import glob
import hashlib
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator

from etils import epath

from hybridnorm_jax.config.data_file_names import RECORD_SUFFIXES
from hybridnorm_jax.data.archives import PACKINGS, chunks, plain_name
from hybridnorm_jax.data.blocks import block_length
from hybridnorm_jax.data.identity import FileIdentity, identities
from hybridnorm_jax.data.records import record_text, records
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.file_formats import BOM, CONTROL, START_BYTES, Kind, format_of, marked_encoding
from hybridnorm_jax.whole_files import expanded, is_local

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# A text file above this size, and every one where so few files are held out, is held out in blocks.
WHOLE_BYTES = 1 << 20
FEWEST_WHOLE = 10
# No longer line of a text file is in memory at once, and one of more blocks than this is cut.
LINE_BYTES = 1 << 20
LONG_LINE_BLOCKS = 4
RECORDS = "write its texts as one JSON record a line (.jsonl)"
# What to do with a file that is not text.
RIGHT = {
    Kind.ARCHIVE: "unpack it, and name its files",
    Kind.PACKED: "unpack it, and name the unpacked file",
    Kind.ARRAY: "for token ids set data.source=tokens",
    Kind.TABLE: RECORDS,
    Kind.PICKLE: RECORDS,
    Kind.DOCUMENT: "extract its text",
    Kind.WEIGHTS: "name files of text",
}
# The text of two files that were joined may have a byte order mark where the second one begins: in front of a line.
_MARKS = re.compile(b"(^|\n)(?:" + BOM + b")+")
_OBJECT_BEGINS = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*+"\s*:', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a block of one; its length in UTF-8 bytes, and the SHA-256 of its identity.

    Attributes:
      continues: whether it is the next block of the same text as the document before it.
    """

    text: str
    num_bytes: int
    digest: bytes
    continues: bool = False


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file and, where it is the path that identifies its document, that path (None: the text does)."""

    path: epath.Path
    identity: str | None = None


def holds_whole_files_out(count: int, fraction: float) -> bool:
    """Whether so many text files are enough to hold whole ones out; otherwise blocks of all files are."""
    return fraction in (0, 1) or fraction * count >= FEWEST_WHOLE


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text files in the order they are read.

    Attributes:
      name: for people.
      files: in their order.
      text_field: of records of JSON.
      root: the directory to which the files' names are relative.
    """

    name: str
    files: tuple[TextFile, ...]
    text_field: str = "text"
    root: str | None = None

    def signature(self) -> list:
        """[name, size in bytes, digest of sampled content, time of last change] of every file.

        The time is no part of a file's identity. It only makes sure that text is tokenized again after a change that
        the samples do not show.
        """
        found = self.identities
        paths = [file.path for file in self.files]
        return [[*dataclasses.astuple(one), _changed(path)] for one, path in zip(found, paths, strict=True)]

    @functools.cached_property
    def identities(self) -> tuple[FileIdentity, ...]:
        """The identity of every file, read once."""
        return identities([file.path for file in self.files], self.root)

    def holds_whole_files_out(self, fraction: float) -> bool:
        """Whether there are enough text files to hold whole ones out."""
        return holds_whole_files_out(len(self.files), fraction)

    def documents(self, file: TextFile, *, whole: bool = True) -> Iterator[Document]:
        """The documents of one of the files.

        Args:
          file: one of `files`.
          whole: whether a text file of up to WHOLE_BYTES is one document; a longer one always comes in blocks.

        Raises:
          DataError: it cannot be read or holds no text.
        """
        found = False
        for text, data, continues in self._texts(file, whole):
            if not continues and (not text or text.isspace()):
                continue
            continues, found = continues and found, True
            identity = data if file.identity is None else file.identity.encode()
            yield Document(text, len(data), hashlib.sha256(identity).digest(), continues)
        # The standard library has empty __init__.py files; anybody else's empty file is a mistake.
        if not found and file.identity is None:
            raise DataError(f"{file.path}: holds no text; remove it from data.files or data.validation")

    def _texts(self, file: TextFile, whole: bool) -> Iterator[tuple[str, bytes, bool]]:
        """(text, its UTF-8, whether it continues the text before)."""
        path = file.path
        if plain_name(path.name).endswith(RECORD_SUFFIXES):
            for record in records(os.fspath(path), _checked(path)):
                text = record_text(_decode(record.json, path, record.offset), record.place, self.text_field)
                yield text, _encode(text, record.place), False
        elif file.identity is not None:
            data = b"".join(chunks(path)).removeprefix(BOM)
            yield _decode(data, path, 0), data, False
        else:
            yield from _text_blocks(path, whole)


def _changed(path: epath.Path) -> int:
    return os.stat(path).st_mtime_ns if is_local(path) else path.stat().mtime


def _checked(path: epath.Path) -> Iterator[bytes]:
    """A file's content, unless its begin shows that it is no text in UTF-8."""
    content = chunks(path)
    start = b""
    for chunk in content:
        start += chunk
        if len(start) >= START_BYTES:
            break
    head = start[: 4 * START_BYTES]
    if found := format_of(head):
        twice = "packed twice: it unpacks to " if any(found == packing.format for packing in PACKINGS) else ""
        raise DataError(f"{path}: {twice}{found.name}; {RIGHT[found.kind]}")
    if encoding := marked_encoding(head):
        raise DataError(f"{path}: {encoding}; convert it: iconv -f {encoding} -t UTF-8")
    if head.count(0) > len(head) / 5:
        raise DataError(f"{path}: no text: many of its bytes are 0; if it is UTF-16, convert it to UTF-8")
    yield start
    yield from content


def _text_blocks(path: epath.Path, whole: bool) -> Iterator[tuple[str, bytes, bool]]:
    """A text file as one text if it is short and `whole`, otherwise in blocks of lines."""
    content = _checked(path)
    begin = bytearray()
    for chunk in content:
        begin += chunk
        if len(begin) > WHOLE_BYTES + len(BOM):
            break
    skipped = len(BOM) if begin.startswith(BOM) else 0
    del begin[:skipped]
    _refuse_records(path, begin)
    if whole and len(begin) <= WHOLE_BYTES:
        yield *_unmarked(bytes(begin), path, skipped, begins_line=True), False
        return

    def all_chunks() -> Iterator[bytes]:
        yield bytes(begin)
        yield from content

    offset, begins_line = skipped, True
    for block in _line_blocks(all_chunks()):
        yield *_unmarked(block, path, offset, begins_line=begins_line), offset > skipped
        offset += len(block)
        begins_line = block.endswith(b"\n")


def _unmarked(block: bytes, path: epath.Path, offset: int, *, begins_line: bool) -> tuple[str, bytes]:
    """A block as text and as UTF-8, without the byte order marks that begin lines."""
    text = _decode(block, path, offset)
    if "\ufeff" not in text:
        return text, block
    # In front of what begins inside a line stands one more character, which keeps its mark.
    data = _MARKS.sub(rb"\1", block) if begins_line else _MARKS.sub(rb"\1", b" " + block)[1:]
    return data.decode(), data


def _line_blocks(content: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines, of block_length or a little more together; a line as long as several blocks is cut."""
    start, parts, length = 0, [], 0
    for line in _bounded_lines(content):
        while len(line) > LONG_LINE_BLOCKS * block_length(start):
            cut = _cut_place(line, block_length(start))
            yield b"".join([*parts, line[:cut]])
            start, parts, length = start + length + cut, [], 0
            line = line[cut:]
        parts.append(line)
        length += len(line)
        if length >= block_length(start):
            yield b"".join(parts)
            start, parts, length = start + length, [], 0
    if parts:
        yield b"".join(parts)


def _cut_place(line: bytes, most: int) -> int:
    """Where to cut a line into at most `most` bytes: after a space, or else between two characters."""
    place = line.rfind(b" ", most // 2, most) + 1
    if place:
        return place
    place = most
    while place > most - 4 and line[place] & 0xC0 == 0x80:  # inside a character of UTF-8
        place -= 1
    return place


def _bounded_lines(content: Iterable[bytes]) -> Iterator[bytes]:
    """Lines; of a longer one pieces of at most LINE_BYTES, which do not cut a character of UTF-8."""
    rest = b""
    for chunk in content:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield from _cut(line + b"\n")
        *pieces, rest = _cut(rest) if rest else [b""]
        yield from pieces
    if rest:
        yield rest


def _cut(line: bytes) -> list[bytes]:
    pieces = []
    while len(line) > LINE_BYTES:
        cut = _cut_place(line, LINE_BYTES)
        pieces.append(line[:cut])
        line = line[cut:]
    return [*pieces, line]


def _refuse_records(path: epath.Path, begin: bytes) -> None:
    """Raise DataError for a text file that holds records of JSON: as prose, its syntax would be trained on."""
    text = bytes(begin[:65536]).decode(errors="replace")
    match = _OBJECT_BEGINS.match(text)
    if match is None:
        return
    several = [line for line in text.split("\n") if line.strip()][:2]
    if match.group(1) or all(line.lstrip().startswith("{") and _OBJECT_BEGINS.match(line) for line in several):
        right = "name it .jsonl, and each record's field data.text_field is read"
        raise DataError(f"{path}: looks like records of JSON, but its name says text; {right}")


def find_files(key: str, patterns: Iterable[str]) -> tuple[epath.Path, ...]:
    """The files that paths and glob patterns name, each once, those of one pattern sorted.

    Raises:
      DataError: a directory, or a name without a file; the message names `key`.
    """
    found: dict[str, epath.Path] = {}
    for pattern in patterns:
        path = epath.Path(expanded(pattern))
        if _is_directory(path):
            raise DataError(f"{key}: {pattern} is a directory; name its files, such as {path / '*.txt'}")
        matches = [path] if _exists(path) else _glob(os.fspath(path))
        if not matches:
            raise DataError(f"{key}: no such file: {pattern}")
        for match in matches:
            found.setdefault(_plain(os.fspath(match)), match)
    return tuple(found.values())


def _is_directory(path: epath.Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long for a file, or with a zero byte
        return False


def _exists(path: epath.Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _plain(path: str) -> str:
    return os.path.abspath(path) if is_local(path) else path


def _glob(pattern: str) -> list[epath.Path]:
    if is_local(pattern):
        try:
            matches = [epath.Path(match) for match in glob.glob(pattern, recursive=True)]
        except (ValueError, re.error):
            return []
    else:
        path = epath.Path(pattern)
        matches = list(path.parent.glob(path.name))
    return sorted(match for match in matches if not match.is_dir())


def pattern_root(patterns: Iterable[str]) -> str:
    """The deepest directory that holds everything the patterns can match: names are relative to it."""
    roots = []
    for pattern in patterns:
        path = _plain(expanded(pattern)).rstrip("/")
        parts = path.split("/")[:-1]
        if not _exists(epath.Path(path)):
            parts = parts[: next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))]
        roots.append(parts)
    common = roots[0] if roots else []
    for parts in roots[1:]:
        same = [mine == other for mine, other in zip(common, parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return "/".join(common) or "/"


def text_corpus(key: str, patterns: Iterable[str], text_field: str) -> Corpus:
    """Any text files: those of JSON are one document a record, all others one each; packed ones are unpacked."""
    patterns = tuple(patterns)
    files = tuple(TextFile(path) for path in find_files(key, patterns))
    name = "1 text file" if len(files) == 1 else f"{len(files)} text files"
    return Corpus(name, files, text_field, pattern_root(patterns))


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
    return Corpus(name, tuple(files), root=os.fspath(root))


def _decode(data: bytes, path: epath.Path, offset: int) -> str:
    """The text of a part of a file, which begins at byte `offset`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        wrong = f"invalid UTF-8 at byte {offset + error.start}"
        if CONTROL.search(data.decode("latin-1")):
            right = "it also holds control characters, so it is no text, or damaged; name files of text"
        else:
            right = "convert the file to UTF-8"
        raise DataError(f"{path}: {wrong}; {right}") from error
    if (place := data.find(0)) >= 0:
        right = "text has none; mend the file, or remove such bytes: tr -d '\\000' < FILE > NEW"
        raise DataError(f"{path}: a zero byte at byte {offset + place}; {right}")
    return text


def _encode(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the text holds half of a surrogate pair ({error.object[error.start]!r})") from error
