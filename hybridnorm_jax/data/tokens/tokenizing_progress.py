"""How far a directory of tokenized text is written, on disk beside it: after a kill, the next process goes on there.

It is a database of SQLite, so that the position in the input, the lengths of the files that are written, and the
digests of the documents that were seen change together or not at all.
"""

import errno
import json
import os
import pathlib
import sqlite3
from collections.abc import Sequence
from typing import Any, Self

from hybridnorm_jax.config.data_file_names import UNFINISHED
from hybridnorm_jax.errors import DataError

# Of a SHA-256: two different ones of 10^12 documents have the same first half with a chance of 10^-15.
DIGEST_BYTES = 16
CACHE_KIB = 64 << 10


class Progress:
    """The state of a directory that is being written. No second process can open it meanwhile."""

    def __init__(self, directory: pathlib.Path):
        """Open, or begin, the state in `directory`.

        Raises:
          DataError: another process is writing there; or the file is damaged.
          OSError: it cannot be written.
        """
        self.path = directory / UNFINISHED
        # The digests that were seen since the last `save`, which is not to be told of those beyond the position.
        self._pending: set[bytes] = set()
        try:
            self._database = sqlite3.connect(self.path, timeout=0, isolation_level=None)
            # An exclusive lock is kept from the first transaction on, until the process ends.
            for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", f"cache_size=-{CACHE_KIB}"):
                self._database.execute(f"PRAGMA {setting}").fetchall()
            self._database.execute("BEGIN EXCLUSIVE")
            self._database.execute("CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, json TEXT)")
            self._database.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise DataError(f"{directory}: another process is writing there; wait until it has ended") from error
            raise OSError(errno.EIO, str(error), os.fspath(self.path)) from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: damaged ({error}); remove {directory} and begin again") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None: there is none."""
        row = self._database.execute("SELECT json FROM state").fetchone()
        return None if row is None else json.loads(row[0])

    def save(self, state: dict[str, Any], digests: Sequence[bytes] = ()) -> None:
        """Save a state, with the digests that `is_new` was asked for up to it.

        Raises:
          OSError: it cannot be written; what was saved before stays.
        """
        keys = [digest[:DIGEST_BYTES] for digest in digests]
        try:
            self._database.execute("BEGIN")
            self._database.execute("INSERT OR REPLACE INTO state VALUES (0, ?)", (json.dumps(state),))
            self._database.executemany("INSERT OR IGNORE INTO seen VALUES (?)", [(key,) for key in keys])
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            number = errno.ENOSPC if "full" in str(error) else errno.EIO
            raise OSError(number, os.strerror(number), os.fspath(self.path)) from error
        self._pending.difference_update(keys)

    def is_new(self, digest: bytes) -> bool:
        """Whether no document with this SHA-256 came before; from now on one has."""
        key = digest[:DIGEST_BYTES]
        if key in self._pending or self._database.execute("SELECT 1 FROM seen WHERE digest = ?", (key,)).fetchone():
            return False
        self._pending.add(key)
        return True

    def forget_digests(self) -> None:
        """Begin again with none."""
        self._pending.clear()
        self._database.execute("DELETE FROM seen")

    def remove(self) -> None:
        """The directory is whole: nothing of this is needed any more."""
        self._database.close()
        for path in self.path.parent.glob(f"{UNFINISHED}*"):
            path.unlink()
