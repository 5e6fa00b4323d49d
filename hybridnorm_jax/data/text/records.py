"""Records of JSON: one a line, or all in one array. Never more than one of them is in memory."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hybridnorm_jax.data.text.deep_json import Unread, kind_of, read_strings
from hybridnorm_jax.errors import DataError, first_line
from hybridnorm_jax.file_formats import BOM

MOST_RECORD_BYTES = 64 << 20
# Of a record that is nested too deeply for Python's parser, in characters: another reads it, at a MiB a second.
MOST_DEEP = 4 << 20
# What matters for finding the end of a value: strings, which may hold brackets, and brackets.
_MARK = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]|"', re.DOTALL)


class Record(NamedTuple):
    """One record's JSON, where it stands (for messages), and the offset of its first byte in the unpacked file."""

    json: bytes
    place: str
    offset: int


def records(path: str, chunks: Iterable[bytes]) -> Iterator[Record]:
    """The records of a file: its first character decides between one array and one record a line.

    Raises:
      DataError: a record too long to be meant; an array that is damaged or does not end.
    """
    chunks = iter(chunks)
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) > len(BOM) and start.removeprefix(BOM).strip():
            break
    skipped = len(BOM) if start.startswith(BOM) else 0
    rest = _chained(start[skipped:], chunks)
    if start[skipped:].lstrip().startswith(b"[{") or re.match(rb"\s*\[\s*(\{|$|\])", start[skipped:]):
        yield from _of_array(path, rest, skipped)
    else:
        yield from _of_lines(path, rest, skipped)


def _chained(start: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if start:
        yield start
    yield from chunks


def _of_lines(path: str, chunks: Iterable[bytes], offset: int) -> Iterator[Record]:
    for number, line in enumerate(lines(path, chunks), start=1):
        # A file that was appended to another one may have brought its byte order mark.
        record, length = line.removeprefix(BOM), len(line)
        del line  # a long one is not kept beside the next one
        if record and not record.isspace():
            yield Record(record, f"{path}:{number}", offset + length - len(record))
        offset += length
        del record


def lines(path: str, chunks: Iterable[bytes], most: int = MOST_RECORD_BYTES) -> Iterator[bytes]:
    """Lines with their newline, the last one perhaps without.

    Raises:
      DataError: a line of more than `most` bytes.
    """
    parts: list[bytes] = []
    length = 0
    for chunk in chunks:
        for line in _split(chunk):
            parts.append(line)
            length += len(line)
            if length > most:
                right = "one record has at most that many; is there one record a line?"
                raise DataError(f"{path}: a line of more than {most >> 20} MiB; {right}")
            if line.endswith(b"\n"):
                # Neither the parts of a long line are kept beside it, nor is it beside the next one.
                whole, parts, length = b"".join(parts), [], 0
                yield whole
                del whole
    if parts:
        yield b"".join(parts)


def _split(chunk: bytes) -> list[bytes]:
    *whole, rest = chunk.split(b"\n")
    ended = [line + b"\n" for line in whole]
    return [*ended, rest] if rest else ended


def _of_array(path: str, chunks: Iterator[bytes], offset: int) -> Iterator[Record]:
    """The elements of one array. `buffer` holds the part of the file from byte `offset` on that is not read yet."""
    reader = _Buffer(path, chunks, offset)
    reader.expect(b"[")
    number = 0
    if reader.peek() == b"]":
        reader.expect(b"]")
    else:
        while True:
            number += 1
            place = f"{path}: record {number} of its array"
            if reader.peek() not in (b"{", b"["):
                raise DataError(f"{place}: not a JSON object")
            begin = reader.offset
            yield Record(reader.value(place), place, begin)
            if reader.peek() == b"]":
                reader.expect(b"]")
                break
            reader.expect(b",")
    if reader.peek():
        raise DataError(f"{path}: at byte {reader.offset} something follows the array; write one record a line instead")


class _Buffer:
    """Bytes of a file from `offset` on, of which more are read when they are needed."""

    def __init__(self, path: str, chunks: Iterator[bytes], offset: int):
        self._path = path
        self._chunks = chunks
        self._content = b""
        self.offset = offset

    def _more(self, least: int = 1) -> bool:
        parts, length = [self._content], 0
        while length < least and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            length += len(chunk)
        self._content = b"".join(parts)
        return length > 0

    def _take(self, count: int) -> bytes:
        taken, self._content = self._content[:count], self._content[count:]
        self.offset += count
        return taken

    def peek(self) -> bytes:
        """The next byte that is no space, b"" at the end of the file."""
        while True:
            self._take(len(self._content) - len(self._content.lstrip(b" \t\r\n")))
            if self._content:
                return self._content[:1]
            if not self._more():
                return b""

    def expect(self, mark: bytes) -> None:
        """Step over `mark`."""
        found = self.peek()
        if found != mark:
            is_what = f"not {found.decode(errors='replace')!r}" if found else "but the file ends: it is truncated"
            raise DataError(f"{self._path}: not JSON: at byte {self.offset} must stand {mark.decode()!r}, {is_what}")
        self._take(1)

    def value(self, place: str) -> bytes:
        """The object or array that begins here."""
        depth = searched = 0
        while True:
            for match in _MARK.finditer(self._content, searched):
                mark = match.group()
                if mark == b'"':  # a string that ends further on
                    break
                searched = match.end()
                depth += (mark in b"[{") - (mark in b"]}")
                if depth == 0:
                    return self._take(searched)
            if len(self._content) > MOST_RECORD_BYTES:
                raise DataError(f"{place}: more than {MOST_RECORD_BYTES >> 20} MiB long, which no record may be")
            # A string is searched again from its begin: twice as much each time keeps that cheap.
            if not self._more(least=len(self._content)):
                raise DataError(f"{place}: not JSON: the file ends inside it; the file is truncated")


def record_fields(content: str, place: str, text_field: str) -> dict[str, object]:
    """The fields of one record.

    Raises:
      DataError: no JSON object; the message names `place`, and the field that is wanted.
    """
    record = _parsed(content, place)
    if not isinstance(record, dict):
        field = f"the field {text_field!r} (data.text_field)"
        raise DataError(f"{place}: the record is {kind_of(record)}, but must be an object with {field}")
    return record


def _parsed(content: str, place: str) -> object:
    try:
        try:
            return json.loads(content)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of thousands of digits, which need not be in the field that is read
            return json.loads(content, parse_int=_number)
    except json.JSONDecodeError as error:
        several = "; a record may not go over several lines" if content.strip() in ("{", "[") else ""
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}){several}") from error
    except RecursionError as error:
        if len(content) > MOST_DEEP:
            right = f"only a record of up to {MOST_DEEP >> 20} MiB may be"
            raise DataError(f"{place}: nested too deeply; {right}") from error
    try:
        return read_strings(content)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({first_line(error)})") from error


def _number(digits: str) -> Unread:
    return Unread("a number")
