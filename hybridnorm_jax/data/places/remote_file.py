"""A file in a bucket or on a server, as a path: readers open its local copy, and messages name its place."""

import dataclasses
import os
import pathlib
import urllib.parse

from etils import epath

HTTP = ("http", "https")


@dataclasses.dataclass(frozen=True)
class RemoteFile(os.PathLike):
    """A file that a store has listed.

    Attributes:
      url: such as s3://bucket/shard.parquet.
      size: in bytes.
      version: changes whenever the content does (an ETag, a digest, a generation); "" where the store has none.
      checksum: `md5:` or `sha256:` and the digest of the content in hexadecimal, where the store knows one.
      beside: the files that belong to it, such as an index; none where nobody asked.
      copy: where the content lies on this machine's disk; None: it was not fetched.
    """

    url: str
    size: int
    version: str
    checksum: str = ""
    beside: "tuple[RemoteFile, ...]" = dataclasses.field(default=(), compare=False)
    copy: pathlib.Path | None = dataclasses.field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return plain_url(self.url).rpartition("/")[2]

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        """For messages: without a query, which may hold a signature that is a secret."""
        return self.url.partition("?")[0] if scheme_of(self.url) in HTTP else self.url


Place = epath.Path | RemoteFile


def readable(path: str | os.PathLike[str]) -> str:
    """The name under which the file's content can be opened on this machine."""
    if not isinstance(path, RemoteFile):
        return os.fspath(path)
    if path.copy is None:
        raise ValueError(f"{path} was not fetched")
    return os.fspath(path.copy)


def scheme_of(url: str) -> str:
    """`s3` of s3://bucket/file; "" of a local path."""
    scheme, separator, _ = url.partition("://")
    return scheme.lower() if separator else ""


def url_in(directory: str, name: str) -> str:
    """The URL of a file in a directory; at a web address with the query of the directory, which may be a signature."""
    if scheme_of(directory) not in HTTP:
        return f"{directory.rstrip('/')}/{name}"
    path, mark, query = directory.partition("?")
    return f"{path.rstrip('/')}/{urllib.parse.quote(name)}{mark}{query}"


def plain_url(url: str) -> str:
    """The URL as a path: of http:// and https:// without query and fragment, and with `%20` as the space it stands for.

    So a file has the name that it would have on a disk.
    """
    if scheme_of(url) not in HTTP:
        return url
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{urllib.parse.unquote(parts.path)}"
