"""What makes data files the same files: their names, their sizes and a digest of sampled content.

Shards of one size are usual, and a time of last change is lost by copying. So whoever asks "is this the data of last
time?" compares these three. A large file is not read whole: a change of bytes that lie between the samples, and that
leaves the size as it was, is not seen.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from hybridnorm_jax.data.files import known_digests
from hybridnorm_jax.data.places.remote_file import Place, RemoteFile, plain_url, readable
from hybridnorm_jax.data.places.store import store_of
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.whole_files import expanded, is_local

# A file of at most so many bytes is read whole; of a longer one the first piece, the last, and others evenly between.
# Ten thousand shards are looked at whenever a run starts.
WHOLE_BYTES = 1 << 20
PIECES = 8
PIECE_BYTES = 1 << 14
READERS = 8


@dataclasses.dataclass(frozen=True)
class FileIdentity:
    """One file: its name, its size in bytes, and the SHA-256 (hexadecimal) of its sampled content."""

    name: str
    size: int
    digest: str


def file_identity(path: str | Place, *, name: str | None = None) -> FileIdentity:
    """The identity of one file; its `name` is the last part of the path unless another is given.

    Raises:
      DataError: the file cannot be read, or is no regular file.
    """
    path = _place(path)
    size = regular_file_size(path)
    return FileIdentity(path.name if name is None else name, size, _digest(path, size))


def _place(path: str | os.PathLike[str]) -> Place:
    return path if isinstance(path, RemoteFile) else epath.Path(path)


def _digest(path: Place, size: int) -> str:
    if isinstance(path, RemoteFile) and path.copy is None:
        return _remote_digest(path)
    digest = hashlib.sha256()
    try:
        with open(readable(path), "rb") as stream:
            for start in _starts(size):
                stream.seek(start)
                digest.update(stream.read(PIECE_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def _remote_digest(file: RemoteFile) -> str:
    """The same digest of a file that was not fetched; only what it is made of is asked for."""
    store, digest = store_of(file.url), hashlib.sha256()
    if file.size <= WHOLE_BYTES:
        digest.update(store.read(file, 0, file.size))
    else:
        for start in _starts(file.size):
            digest.update(store.read(file, start, start + PIECE_BYTES))
    return digest.hexdigest()


def identities(paths: Iterable[str | Place], root: str | os.PathLike[str] | None = None) -> tuple[FileIdentity, ...]:
    """The identities of several files, in their order.

    Each is named by its path relative to `root`, which is the deepest directory that holds all of them where none is
    given. So moving the whole directory changes no identity, and files of one name in several directories differ.
    A file that was read before and has not changed since is not read again (known_digests.py).

    Raises:
      DataError: a file cannot be read, or is no regular file.
    """
    paths = [_place(path) for path in paths]
    names = relative_names(paths, root)
    sizes = [regular_file_size(path) for path in paths]
    digests = known_digests.digests(paths, _read_digests)
    return tuple(FileIdentity(*parts) for parts in zip(names, sizes, digests, strict=True))


def _read_digests(paths: Sequence[Place]) -> list[str]:
    def read(path: Place) -> str:
        return file_identity(path).digest

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, paths))


def relative_names(
    paths: Iterable[str | os.PathLike[str]], root: str | os.PathLike[str] | None = None
) -> tuple[str, ...]:
    """The paths relative to `root`, with `/` between their parts; see `identities`."""
    parts = [_parts(path) for path in paths]
    above = list(_parts(root)) if root is not None else _common([part[:-1] for part in parts])
    return tuple("/".join(part[len(above) :] if list(part[: len(above)]) == above else part) for part in parts)


def regular_file_size(path: Place) -> int:
    """The size in bytes of what must be a regular file: a named pipe or a device may never end, or never begin.

    Raises:
      DataError: the file cannot be read, or is no regular file.
    """
    if isinstance(path, RemoteFile):
        return path.size
    try:
        status = os.stat(readable(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: no regular file; copy its content to a file, and name that")
    return status.st_size


def _starts(size: int) -> list[int]:
    if size <= WHOLE_BYTES:
        return list(range(0, size, PIECE_BYTES))
    return np.linspace(0, size - PIECE_BYTES, PIECES, dtype=np.int64).tolist()


def _parts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    text = plain_url(os.fspath(path))
    if is_local(text):
        text = os.path.abspath(expanded(text))
    return tuple(text.rstrip("/").split("/"))


def _common(parts: list[tuple[str, ...]]) -> list[str]:
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return common
