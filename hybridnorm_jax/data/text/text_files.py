"""Text files: in UTF-8 and nothing else, as a whole or in blocks of lines."""

import re
from collections.abc import Iterable, Iterator

from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.data.text.archives import PACKINGS, chunks
from hybridnorm_jax.data.text.blocks import block_length
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.file_formats import (
    ARROW_FILE,
    ARROW_STREAM,
    BOM,
    CONTROL,
    PARQUET,
    START_BYTES,
    TAR,
    Kind,
    format_of,
    marked_encoding,
)

# A text file above this size, and every one where so few files are held out, is held out in blocks.
WHOLE_BYTES = 1 << 20
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
# Formats of records that are read, but not under a name that says text or JSON.
RIGHT_NAMES = {PARQUET: ".parquet", ARROW_FILE: ".arrow", ARROW_STREAM: ".arrow", TAR: ".tar"}
# The text of two files that were joined may have a byte order mark where the second one begins: in front of a line.
_MARKS = re.compile(b"(^|\n)(?:" + BOM + b")+")
_OBJECT_BEGINS = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*+"\s*:', re.DOTALL)


def checked_chunks(path: Place) -> Iterator[bytes]:
    """A file's content, unless its begin shows that it is no text in UTF-8."""
    content = chunks(path)
    start = b""
    for chunk in content:
        start += chunk
        if len(start) >= START_BYTES:
            break
    head = start[: 4 * START_BYTES]
    if found := format_of(head):
        if name := RIGHT_NAMES.get(found):
            raise DataError(f"{path}: {found.name}; give it a name that ends in {name}, and it is read as what it is")
        twice = "packed twice: it unpacks to " if any(found == packing.format for packing in PACKINGS) else ""
        raise DataError(f"{path}: {twice}{found.name}; {RIGHT[found.kind]}")
    if encoding := marked_encoding(head):
        raise DataError(f"{path}: {encoding}; convert it: iconv -f {encoding} -t UTF-8")
    if head.count(0) > len(head) / 5:
        raise DataError(f"{path}: no text: many of its bytes are 0; if it is UTF-16, convert it to UTF-8")
    yield start
    yield from content


def text_blocks(path: Place, whole: bool) -> Iterator[tuple[str, bytes, bool]]:
    """A text file as one text if it is short and `whole`, otherwise in blocks of lines."""
    content = checked_chunks(path)
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


def _unmarked(block: bytes, path: Place, offset: int, *, begins_line: bool) -> tuple[str, bytes]:
    """A block as text and as UTF-8, without the byte order marks that begin lines."""
    text = decoded(block, path, offset)
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


def _refuse_records(path: Place, begin: bytes) -> None:
    """Raise DataError for a text file that holds records of JSON: as prose, its syntax would be trained on."""
    text = bytes(begin[:65536]).decode(errors="replace")
    match = _OBJECT_BEGINS.match(text)
    if match is None:
        return
    several = [line for line in text.split("\n") if line.strip()][:2]
    if match.group(1) or all(line.lstrip().startswith("{") and _OBJECT_BEGINS.match(line) for line in several):
        right = "name it .jsonl, and each record's field data.text_field is read"
        raise DataError(f"{path}: looks like records of JSON, but its name says text; {right}")


def decoded(data: bytes, path: Place | str, offset: int) -> str:
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
