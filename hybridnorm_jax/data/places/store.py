"""What every place of remote files can do, and which place a URL is in."""

import functools
from collections.abc import Iterator
from typing import Protocol

from hybridnorm_jax.data.places.bucket_store import SCHEMES, BucketStore
from hybridnorm_jax.data.places.http_store import HttpStore
from hybridnorm_jax.data.places.remote_file import HTTP, RemoteFile, scheme_of
from hybridnorm_jax.errors import DataError, did_you_mean


class Store(Protocol):
    """A place of remote files. Every method may raise DataError, in one line that names the file."""

    def find(self, url: str) -> list[RemoteFile]:
        """The files that a URL or a pattern names, sorted; none where it names none."""

    def is_directory(self, url: str) -> bool:
        """Whether files lie below this URL, and none at it."""

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""

    def pieces(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The content from `start` on, in pieces; the file may be overwritten between two of them.

        So whoever keeps them asks `find` again after the last one.
        """


@functools.cache
def _store(scheme: str) -> Store:
    return HttpStore() if scheme in HTTP else BucketStore(scheme)


def store_of(url: str) -> Store:
    """The store that a URL is in.

    Raises:
      DataError: of no known kind.
      MissingExtraError: its package is not installed.
    """
    scheme = scheme_of(url)
    if scheme not in (*SCHEMES, *HTTP):
        known = did_you_mean(scheme, (*SCHEMES, *HTTP))
        raise DataError(f"{url}: files of {scheme}:// cannot be read{known}")
    return _store(scheme)
