"""Documents of a tar archive as WebDataset writes them: the members `KEY.txt` and `KEY.json`, which stand together.

The archive is read as a stream and never unpacked to a disk. Python's tarfile reads a whole extended header into
memory, however long it says it is, so that here only its parser of one header block is used.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.data.text.records import MOST_RECORD_BYTES
from hybridnorm_jax.errors import DataError, first_line

BLOCK = tarfile.BLOCKSIZE
# Of a header that follows the first block: long names, and what a pax header says.
MOST_HEADER_BYTES = 1 << 20
TEXT_ENDS = (".txt", ".text")
JSON_END = ".json"
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
PAX, PAX_OF_ALL = tarfile.XHDTYPE, tarfile.XGLTYPE


class Member(NamedTuple):
    """What a sample of an archive is read from: its text, its JSON, or both."""

    key: str
    text: bytes | None
    json: bytes | None


def members(path: Place, content: Iterator[bytes]) -> Iterator[Member]:
    """The samples of an archive that have a text or a JSON object.

    Args:
      path: for messages.
      content: of the unpacked archive.

    Raises:
      DataError: the archive is damaged or truncated, or a member is too long.
    """
    waiting: Member | None = None
    for name, data in _files(path, _Stream(path, content)):
        key, _, end = name.rpartition(".")
        is_text = f".{end.lower()}" in TEXT_ENDS
        if waiting and (key != waiting.key or (waiting.text if is_text else waiting.json) is not None):
            yield waiting
            waiting = None
        waiting = waiting or Member(key, None, None)
        waiting = waiting._replace(text=data) if is_text else waiting._replace(json=data)
    if waiting:
        yield waiting


class _Stream:
    """Bytes in order, of which a number at a time is taken or skipped."""

    def __init__(self, path: Place, content: Iterator[bytes]):
        self._path = path
        self._content = content
        self._chunk = b""
        self._place = 0  # in the chunk
        self.offset = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end."""
        taken = self._chunk[self._place : self._place + count]
        self._place += len(taken)
        if len(taken) < count:
            parts, length = [taken], len(taken)
            while length < count and (chunk := next(self._content, b"")):
                self._chunk, self._place = chunk, min(count - length, len(chunk))
                parts.append(chunk[: self._place])
                length += self._place
            taken = b"".join(parts)
        self.offset += len(taken)
        return taken

    def skip(self, count: int) -> None:
        """Go past `count` bytes without keeping them."""
        while count:
            taken = self.take(min(count, 1 << 20))
            if not taken:
                raise DataError(f"{self._path}: truncated: the archive ends inside a member")
            count -= len(taken)

    def exactly(self, count: int) -> bytes:
        """The next `count` bytes, and the padding that fills their last block."""
        data = self.take(count)
        if len(data) < count:
            raise DataError(f"{self._path}: truncated: the archive ends inside a member")
        self.skip(-count % BLOCK)
        return data


def _files(path: Place, stream: _Stream) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files whose name says text or JSON."""
    name, size = None, None
    ended = False
    while block := stream.take(BLOCK):
        if not any(block):
            ended = True  # two such blocks end an archive, and another may follow
            continue
        ended = False
        header = _header(path, block, stream.offset - BLOCK)
        if header.type in (LONG_NAME, LONG_LINK, PAX, PAX_OF_ALL):
            extended = _extended(path, header, stream)
            name = extended.get("path", name)
            size = extended.get("size", size)
            continue
        own_name = header.name if name is None else name
        own_size = header.size if size is None else size
        name, size = None, None
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise DataError(f"{path}: the member {own_name} is a sparse file, which is not read; pack it plainly")
        if header.type not in tarfile.REGULAR_TYPES:
            # A directory, a link or a device has no content, whatever its header says; of other types, nobody knows.
            stream.skip(0 if header.type in tarfile.SUPPORTED_TYPES else own_size + -own_size % BLOCK)
            continue
        # macOS packs a file's attributes as one more file beside it, `._NAME`.
        is_attributes = posixpath.basename(own_name).startswith("._")
        if not is_attributes and own_name.lower().endswith((*TEXT_ENDS, JSON_END)):
            if own_size > MOST_RECORD_BYTES:
                raise DataError(f"{path}: the member {own_name} has more than {MOST_RECORD_BYTES >> 20} MiB")
            yield own_name, stream.exactly(own_size)
        else:
            stream.skip(own_size + -own_size % BLOCK)
    if not ended:
        raise DataError(f"{path}: truncated: the mark that ends an archive is missing")


def _header(path: Place, block: bytes, offset: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        raise DataError(f"{path}: a damaged tar archive at byte {offset} ({first_line(error)})") from error
    if header.size < 0:
        raise DataError(f"{path}: a damaged tar archive at byte {offset}: a member of negative size")
    return header


def _extended(path: Place, header: tarfile.TarInfo, stream: _Stream) -> dict:
    """What a header of several blocks says of the member after it: its `path`, its `size`, or nothing of these."""
    if header.size > MOST_HEADER_BYTES:
        raise DataError(f"{path}: a header of {header.size} bytes, which no tar archive of texts has")
    content = stream.exactly(header.size)
    if header.type == LONG_NAME:
        return {"path": content.rstrip(b"\0").decode(errors="replace")}
    if header.type != PAX:
        return {}
    found = {}
    while content:
        length, space, _ = content.partition(b" ")
        if not (space and length.isdigit() and len(length) < 8 and len(length) + 2 < int(length) <= len(content)):
            raise DataError(f"{path}: a damaged tar archive: a pax header that cannot be read")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        content = content[int(length) :]
        if key == b"path":
            found["path"] = value.decode(errors="replace")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            found["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            raise DataError(f"{path}: a member is a sparse file, which is not read; pack it plainly")
    return found
