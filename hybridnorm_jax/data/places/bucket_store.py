"""Buckets and repositories through fsspec: s3://, gs:// and hf://."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from hybridnorm_jax.data.places.patience import PIECE_BYTES, patiently
from hybridnorm_jax.data.places.remote_file import RemoteFile, url_in
from hybridnorm_jax.errors import MissingExtraError

# boto would try again by itself, without a word.
_BOTO = {"connect_timeout": 20, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
# Of each kind of place: the arguments of fsspec's file system. A listing that it kept would not show changes.
SCHEMES = {
    "s3": {"use_listings_cache": False, "config_kwargs": _BOTO},
    "gs": {"use_listings_cache": False},
    "hf": {"use_listings_cache": False},
}

# How their URLs are written.
FORMS = {"s3": "s3://BUCKET/PATH", "gs": "gs://BUCKET/PATH", "hf": "hf://datasets/OWNER/NAME/PATH"}


class BucketStore:
    """Files of one kind of bucket, with the credentials that its own tools use (or fsspec's settings, FSSPEC_...)."""

    def __init__(self, scheme: str):
        """Set out to read from places of this kind; nothing is asked before the first file."""
        self._scheme = scheme

    @functools.cached_property
    def _files(self) -> Any:
        try:
            import fsspec

            found = fsspec.filesystem(self._scheme, **SCHEMES[self._scheme])
        except ImportError as error:
            raise MissingExtraError(f"{self._scheme}:// files", "remote") from error
        if hasattr(found, "retries"):
            found.retries = 1
        return found

    def find(self, url: str) -> list[RemoteFile]:
        """As Store."""
        files = self._files

        def ask() -> dict[str, dict[str, Any]]:
            files.invalidate_cache()
            try:
                one = files.info(url)
                if one["type"] == "file":
                    return {url: one}
            except FileNotFoundError:
                pass
            return files.glob(url, detail=True) if "*" in url or "?" in url or "[" in url else {}

        found = [self._file(info) for info in patiently(url, ask).values() if info["type"] == "file"]
        return sorted(found, key=lambda file: file.url)

    def find_in(self, directory: str, names: Sequence[str]) -> dict[str, RemoteFile]:
        """As Store: in one listing."""
        wanted = set(names)
        return {file.name: file for file in self.find(url_in(directory, "*")) if file.name in wanted}

    def is_directory(self, url: str) -> bool:
        """As Store."""

        def ask() -> bool:
            try:
                return self._files.info(url)["type"] == "directory"
            except FileNotFoundError:
                return False

        return patiently(url, ask)

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """As Store."""

        def ask() -> bytes:
            content = self._files.cat_file(file.url, start=start, end=stop)
            if len(content) != stop - start:
                raise ConnectionError(f"{len(content)} bytes came instead of {stop - start}")
            return content

        return patiently(file, ask) if stop > start else b""

    def pieces(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """As Store."""
        for begin in range(start, file.size, PIECE_BYTES):
            yield self.read(file, begin, min(begin + PIECE_BYTES, file.size))

    def _file(self, info: dict[str, Any]) -> RemoteFile:
        url = f"{self._scheme}://{info['name'].partition('://')[2] or info['name']}"
        return RemoteFile(url, int(info["size"]), _version(info), _checksum(info))


def _version(info: dict[str, Any]) -> str:
    """What is another whenever the content is: the first of these that a store knows."""
    if lfs := info.get("lfs"):
        return str(lfs["sha256"])
    names = ("ETag", "etag", "generation", "xet_hash", "blob_id", "LastModified", "updated")
    found = next((str(info[name]) for name in names if info.get(name)), "")
    return found.strip('"')


def _checksum(info: dict[str, Any]) -> str:
    if lfs := info.get("lfs"):
        return f"sha256:{lfs['sha256']}"
    if md5 := info.get("md5Hash"):
        import base64

        return f"md5:{base64.b64decode(md5).hex()}"
    return ""
