"""Files on web servers, by their whole https:// (or http://) address: Python's own client, which needs no extra.

A server lists nothing, so that an address is no pattern. It is asked for ranges; one that has none sends the file from
its begin again after a connection has failed.
"""

import base64
import concurrent.futures
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from hybridnorm_jax.data.places.patience import ABSENT, PIECE_BYTES, ServerError, patiently
from hybridnorm_jax.data.places.remote_file import RemoteFile, plain_url, url_in
from hybridnorm_jax.errors import DataError, first_line

# Without a byte; the whole request has a limit of its own (patience.py).
SILENT_SECONDS = 60.0
# Content as it lies on the server. Packed for the way, it would have another length.
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "hybridnorm-jax"}
ASKERS = 16  # files that are asked for at once
NO_HEAD = (403, 405, 501)  # what servers that do not answer HEAD say
CHANGED = "was changed while it was read; start again with files that nobody writes to"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, and none from https:// to what somebody on the way could read and change."""

    max_redirections = 5

    def redirect_request(self, request: Any, stream: Any, code: int, message: str, headers: Any, url: str) -> Any:
        target = urllib.parse.urlsplit(url).scheme
        if target not in ("http", "https") or (request.type == "https" and target != "https"):
            raise DataError(f"{plain_url(request.full_url)}: its server leads from https:// to {target}://; refused")
        return super().redirect_request(request, stream, code, message, headers, url)


class HttpStore:
    """Files on any web server."""

    def __init__(self):
        """Make a client that opens nothing but http:// and https://; proxies are those of the environment."""
        self._client = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
        ):
            self._client.add_handler(handler)

    def find(self, url: str) -> list[RemoteFile]:
        """As Store: the one file, if it is there."""
        _check(url)
        if self.is_directory(url):
            return []
        return patiently(RemoteFile(url, 0, ""), lambda: self._ask(url))

    def find_in(self, directory: str, names: Sequence[str]) -> dict[str, RemoteFile]:
        """As Store: one request for each."""
        with concurrent.futures.ThreadPoolExecutor(ASKERS) as pool:
            found = pool.map(lambda name: self.find(url_in(directory, name)), names)
            return {name: files[0] for name, files in zip(names, found, strict=True) if files}

    def is_directory(self, url: str) -> bool:
        """As Store: a server has no directories, but an address with `/` at its end is meant to be one."""
        return _path(url).endswith("/") or not _path(url)

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """As Store."""

        def ask() -> bytes:
            with self._open(file, start, stop) as answer:
                return _exactly(answer, stop - start)

        return patiently(file, ask) if stop > start else b""

    def pieces(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """As Store."""
        answer: http.client.HTTPResponse | None = None

        def ask() -> bytes:
            nonlocal answer
            try:
                if answer is None:
                    answer = self._open(file, start, file.size)
                return _exactly(answer, min(PIECE_BYTES, file.size - start))
            except BaseException:
                if answer is not None:
                    answer.close()
                answer = None  # the next try begins where this piece does
                raise

        while start < file.size:
            piece = patiently(file, ask)
            start += len(piece)
            yield piece
        if answer is not None:
            answer.close()

    def _ask(self, url: str) -> list[RemoteFile]:
        try:
            answer = self._head(url)
        except ServerError as error:
            if error.status in ABSENT:
                return []
            raise
        with answer:
            if _path(answer.geturl()) == _path(url) + "/":
                return []  # the page of a directory, to which its server leads from its name
            size = _size(answer)
            if size is None:
                right = "copy it to a local disk, and name that"
                raise DataError(f"{RemoteFile(url, 0, '')}: its server does not say how long the file is; {right}")
            return [RemoteFile(url, size, _version(answer), _checksum(answer))]

    def _head(self, url: str) -> http.client.HTTPResponse:
        """What a server says of a file; one that does not answer HEAD is asked for the first byte."""
        try:
            return self._request(url, "HEAD", {})
        except ServerError as error:
            if error.status not in NO_HEAD:
                raise
        return self._request(url, "GET", {"Range": "bytes=0-0"})

    def _open(self, file: RemoteFile, start: int, stop: int) -> http.client.HTTPResponse:
        """The answer with the file's content from `start` on."""
        whole = start == 0 and stop == file.size
        answer = self._request(file.url, "GET", {} if whole else {"Range": f"bytes={start}-{stop - 1}"})
        try:
            if _version(answer) != file.version or _size(answer) not in (None, file.size):
                raise DataError(f"{file}: {CHANGED}")
            if not whole and answer.status != 206:
                left = start  # the server has no ranges
                while left:
                    left -= len(_exactly(answer, min(left, PIECE_BYTES)))
        except BaseException:
            answer.close()
            raise
        return answer

    def _request(self, url: str, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, headers=HEADERS | headers, method=method)
        try:
            return self._client.open(request, timeout=SILENT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            raise ServerError(error.code, first_line(error).partition(": ")[2]) from error
        except urllib.error.URLError as error:
            raise ConnectionError(str(error.reason)) from error
        except http.client.HTTPException as error:
            raise ConnectionError(f"no HTTP ({type(error).__name__})") from error


def _check(url: str) -> None:
    """Refuse an address that cannot be right, or that would be kept with a password in it."""
    shown = url.partition("?")[0]
    try:
        parts = urllib.parse.urlsplit(url)
        port_is_number = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_number = None, False
    if parts is None or not parts.hostname or not port_is_number:
        raise DataError(f"{shown}: no address; it must be as https://SERVER/PATH")
    if parts.username is not None:
        raise DataError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: an address with a user or password is not kept"
        )
    if not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
        raise DataError(f"{shown}: an address has no spaces and only ASCII; write others as %20 and the like")
    if "*" in parts.path:
        right = """name each of them, in a list: 'data.files=["@list.txt"]'"""
        raise DataError(f"{shown}: a server lists no files; {right}")


def _path(url: str) -> str:
    return urllib.parse.urlsplit(url).path


def _exactly(answer: http.client.HTTPResponse, count: int) -> bytes:
    try:
        content = answer.read(count)
    except http.client.HTTPException as error:
        raise ConnectionError(f"the connection broke ({type(error).__name__})") from error
    if len(content) != count:
        raise ConnectionError(f"the connection ended after {len(content)} of {count} bytes")
    return content


def _size(answer: http.client.HTTPResponse) -> int | None:
    """The bytes of the whole file, if the answer says so."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return None
    text = answer.headers.get("Content-Length", "")
    if answer.status == 206:
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdigit() and len(text) < 20 else None


def _version(answer: http.client.HTTPResponse) -> str:
    return answer.headers.get("ETag", "") or answer.headers.get("Last-Modified", "")


def _checksum(answer: http.client.HTTPResponse) -> str:
    """The digest that a server may state (RFC 9530); it is of the whole file where no range was asked for."""
    stated = answer.headers.get("Repr-Digest", "")
    if found := re.search(r"sha-256=:([A-Za-z0-9+/=]{44}):", stated):
        return f"sha256:{base64.b64decode(found.group(1)).hex()}"
    return ""
