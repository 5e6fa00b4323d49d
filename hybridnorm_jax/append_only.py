"""Files that only grow: one local file, or numbered objects in a bucket, where nothing can be appended to."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from hybridnorm_jax.whole_files import is_local

# Each object of a bucket is uploaded again for each of its appends, so this many times at most.
APPENDS_PER_OBJECT = 64
READING_THREADS = 16


class AppendOnlyFile:
    """Bytes that are added to a file, each time as a whole. What an earlier process wrote is never touched.

    A local file is held open. In a bucket the bytes go to the objects NAME.000001, NAME.000002, ...: each is uploaded
    at most APPENDS_PER_OBJECT times, so what is uploaded grows as the file does, and no process adds to an object of
    another one.

    Args:
      path: in a directory that exists; local or in a bucket. Nothing is made there before `open` or `append`.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._file: _LocalFile | _Objects | None = None

    def open(self) -> None:
        """Make the file if it is not there; an incomplete last line of a local one is ended first. Raises OSError."""
        if self._file is None:
            self._file = _LocalFile(self._path) if is_local(self._path) else _Objects(self._path)

    def append(self, data: bytes) -> None:
        """Add these bytes. They are with the operating system, or in the bucket, when this returns. Raises OSError."""
        self.open()
        self._file.append(data)

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()


def existing_parts(path: epath.Path) -> list[epath.Path]:
    """The files that hold what was appended to `path`, in order: `path` itself, then its numbered ones."""
    name = re.compile(re.escape(path.name) + r"(\.\d{6,})?")
    found = path.parent.iterdir() if path.parent.exists() else ()
    parts = [part for part in found if name.fullmatch(part.name)]
    return sorted(parts, key=lambda part: (len(part.name), part.name))


def read_parts(parts: Sequence[epath.Path]) -> list[bytes]:
    """The content of each of these files. Raises OSError."""
    if len(parts) < 2:
        return [_read(part) for part in parts]
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(_read, parts))


def _read(part: epath.Path) -> bytes:
    with _os_errors(part):
        return part.read_bytes()


@contextlib.contextmanager
def _os_errors(path: epath.Path) -> Iterator[None]:
    """Make an OSError of what a bucket's client raises."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(None, str(error).partition("\n")[0] or type(error).__name__, os.fspath(path)) from error


class _LocalFile:
    """One handle, without a buffer. Goes on with the numbered file that is newest where a bucket was copied here."""

    def __init__(self, path: epath.Path):
        parts = existing_parts(path)
        self._path = os.fspath(parts[-1] if parts else path)
        self._handle = open(self._path, "a+b", buffering=0)  # noqa: SIM115
        if self._handle.tell():
            self._handle.seek(-1, os.SEEK_END)
            if self._handle.read(1) != b"\n":
                self.append(b"\n")

    def append(self, data: bytes) -> None:
        self._check_in_place()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._handle.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from error

    def _check_in_place(self) -> None:
        """Raise OSError where the file was removed or replaced: nobody would find what is written to the handle."""
        try:
            in_place = os.path.samestat(os.stat(self._path), os.fstat(self._handle.fileno()))
        except FileNotFoundError:
            in_place = False
        if not in_place:
            raise FileNotFoundError(None, "was removed or replaced by another process", self._path)

    def close(self) -> None:
        self._handle.close()


class _Objects:
    """Numbered objects of a bucket."""

    def __init__(self, path: epath.Path):
        self._path = path
        numbers = [int(suffix) for part in existing_parts(path) if (suffix := part.name[len(path.name) + 1 :])]
        self._number = max(numbers, default=0)
        self._held = b""
        self._appends = APPENDS_PER_OBJECT

    def append(self, data: bytes) -> None:
        if self._appends == APPENDS_PER_OBJECT:
            self._number, self._held, self._appends = self._number + 1, b"", 0
        held = self._held + data
        part = self._path.with_name(f"{self._path.name}.{self._number:06d}")
        with _os_errors(part):
            part.write_bytes(held)
        self._held, self._appends = held, self._appends + 1

    def close(self) -> None:
        pass
