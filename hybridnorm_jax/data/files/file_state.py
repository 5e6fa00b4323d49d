"""Whether a file is still the one that a run began with, told by its size and the time of its last change."""

import os
from typing import NamedTuple, Self

from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.errors import DataError

UNCHANGED = "start again with files that nobody writes to"


class FileState(NamedTuple):
    """A file's size in bytes, and the time of its last change in nanoseconds."""

    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Place) -> Self:
        """The state of a file now.

        Raises:
          DataError: it is not there.
        """
        try:
            return cls.read(readable(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error

    @classmethod
    def read(cls, file: str | int) -> Self:
        """The state of a path on this machine, or of an open file by its number; OSError where there is none."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns)

    def check(self, now: Self, name: str) -> None:
        """Refuse a file that has another state `now`.

        Raises:
          DataError: names the file, which is called `name`.
        """
        if now.size != self.size:
            raise DataError(f"{name}: has {now.size:,} bytes now, but had {self.size:,}; {UNCHANGED}")
        if now != self:
            raise DataError(f"{name}: was changed while it was in use; {UNCHANGED}")
