"""Which copies are in use, by which processes: a file for each owner, locked as long as its process lives.

The system takes the lock away when a process ends in whatever way, so that what it used is free again. One descriptor
is enough for any number of copies.
"""

import collections
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


class Owner:
    """One user of copies in a folder. All methods but the constructor are called while the folder is locked."""

    def __init__(self, folder: Path):
        """Make the owner's file, which holds a line for each copy taken or given back."""
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._folder = folder
        self._file = os.open(folder / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def take(self, key: str) -> None:
        """Say that a copy is in use."""
        os.write(self._file, f"+{key}\n".encode())

    def give_back(self, key: str) -> None:
        """Say that it is no longer, for each time that it was taken."""
        os.write(self._file, f"-{key}\n".encode())

    def living(self) -> set[str]:
        """The names of all owners that live; the files of others are removed."""
        return {name for name, _ in self._owners()}

    def in_use(self) -> set[str]:
        """The keys of all copies that any process uses."""
        return {key for _, keys in self._owners() for key in keys}

    def _owners(self) -> Iterator[tuple[str, set[str]]]:
        for path in sorted(self._folder.iterdir()):
            if path.name == self.name or _is_locked(path):
                yield path.name, _keys(path)
            else:
                path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(number)
    return False


def _keys(path: Path) -> set[str]:
    taken: collections.Counter[str] = collections.Counter()
    for line in path.read_text().splitlines():
        taken[line[1:]] += 1 if line.startswith("+") else -1
    return {key for key, count in taken.items() if count > 0}
