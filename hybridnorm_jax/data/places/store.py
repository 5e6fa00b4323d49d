"""What every place of remote files can do, and which place a URL is in."""

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

from hybridnorm_jax.data.places.bucket_store import FORMS, SCHEMES, BucketStore
from hybridnorm_jax.data.places.http_store import HttpStore
from hybridnorm_jax.data.places.patience import AccessRefusedError
from hybridnorm_jax.data.places.remote_file import HTTP, RemoteFile, scheme_of
from hybridnorm_jax.errors import DataError, did_you_mean


class Store(Protocol):
    """A place of remote files. Every method may raise DataError, in one line that names the file."""

    def find(self, url: str) -> list[RemoteFile]:
        """The files that a URL or a pattern names, sorted; none where it names none."""

    def find_in(self, directory: str, names: Sequence[str]) -> dict[str, RemoteFile]:
        """Those of the names that are files in the directory at a URL."""

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
      DataError: of no known kind; a bucket's without a bucket, or with a scheme that is not in lower case.
      MissingExtraError: its package is not installed.
    """
    scheme = scheme_of(url)
    if scheme not in (*SCHEMES, *HTTP):
        known = did_you_mean(scheme, (*SCHEMES, *HTTP))
        raise DataError(f"{url}: files of {scheme}:// cannot be read{known}")
    if scheme in SCHEMES:
        _check_bucket(url, scheme)
    return _store(scheme)


def find_one(url: str) -> RemoteFile | None:
    """The file at a URL that need not be there; None also where access is refused.

    A bucket that strangers may not list says of what is absent that access is refused.

    Raises:
      DataError: the place cannot be asked.
    """
    try:
        return next(iter(store_of(url).find(url)), None)
    except AccessRefusedError:
        return None


def content_of(file: RemoteFile, *, most: int) -> bytes:
    """All bytes of a short file.

    Raises:
      DataError: it has more than `most`, cannot be read, or was changed meanwhile.
    """
    if file.size > most:
        raise DataError(f"{file}: {file.size:,} bytes; at most {most:,} can be meant")
    store = store_of(file.url)
    content = b"".join(store.pieces(file, 0))
    if store.find(file.url) != [file]:
        raise DataError(f"{file}: was changed or removed while it was read; start again")
    return content


def _check_bucket(url: str, scheme: str) -> None:
    named, _, place = url.partition("://")
    if named != scheme:
        raise DataError(f"{url}: write {named}:// in lower case: {scheme}://{place}")
    if not place.partition("/")[0]:
        raise DataError(f"{url}: names no file; it must be as {FORMS[scheme]}")
