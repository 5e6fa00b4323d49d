"""Real servers for tests of remote files: a web server with faults to order, S3 by moto, a Hub of one dataset."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest


@dataclasses.dataclass
class WebFiles:
    """What a web server has, and how it misbehaves.

    Attributes:
      content: path -> bytes.
      faults: path -> what its next answers are, one after the other: an HTTP status; "cut": half of the body, and the
        connection ends; "hang": nothing for two seconds; "trickle": one byte in 50 ms; "overwrite":
        after half of the body the file holds zeros, and so does the rest of the body; a URL: a redirect.
      requests: (method, path) -> how often it was asked for.
      has_ranges, has_versions, has_head: what the server can do.
      absent: the HTTP status of a file that is not there; 403 of a bucket whose files nobody may list.
      digest: whether it states a digest; a wrong one is "wrong".
    """

    content: dict[str, bytes] = dataclasses.field(default_factory=dict)
    faults: dict[str, list[int | str]] = dataclasses.field(default_factory=dict)
    requests: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    sent: int = 0
    has_ranges: bool = True
    has_versions: bool = True
    has_head: bool = True
    absent: int = 404
    digest: str = ""
    url: str = ""

    def put(self, name: str, content: bytes) -> str:
        """Add a file; returns its address."""
        self.content[f"/{name}"] = content
        return f"{self.url}/{name}"


def _handler(files: WebFiles) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            if files.has_head:
                self._answer(with_body=False)
            else:
                self._status(405)

        def do_GET(self):
            self._answer(with_body=True)

        def _status(self, status, headers=()):
            self.send_response(status)
            for name, value in (*headers, ("Content-Length", "0")):
                self.send_header(name, value)
            self.end_headers()

        def _answer(self, *, with_body):
            path = self.path.partition("?")[0]
            files.requests[self.command, path] += 1
            faults = files.faults.get(path, [])
            # A fault to the body is kept for the request that asks for one.
            fault = (
                faults.pop(0) if faults and (with_body or isinstance(faults[0], int) or "://" in faults[0]) else None
            )
            if isinstance(fault, int):
                return self._status(fault)
            if isinstance(fault, str) and "://" in fault:
                return self._status(302, [("Location", fault)])
            content = files.content.get(path)
            if content is None:
                return self._status(files.absent)
            self._send(content, fault, with_body)

        def _send(self, content, fault, with_body):
            start, stop = 0, len(content)
            asked = self.headers.get("Range", "")
            is_part = asked.startswith("bytes=") and files.has_ranges
            if is_part:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or stop) + 1, stop)
            self.send_response(206 if is_part else 200)
            if is_part:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            if files.has_versions:
                self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
            if files.digest:
                import base64

                value = hashlib.sha256(b"wrong" if files.digest == "wrong" else content).digest()
                self.send_header("Repr-Digest", f"sha-256=:{base64.b64encode(value).decode()}:")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if not with_body:
                return
            body = content[start:stop]
            files.sent += len(body)
            with contextlib.suppress(OSError):
                if fault == "hang":
                    time.sleep(2)
                if fault == "trickle":
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(0.05)
                elif fault == "overwrite":
                    self.wfile.write(body[: len(body) // 2])
                    files.content[self.path] = bytes(len(content))
                    self.wfile.write(bytes(len(body) - len(body) // 2))
                elif fault == "cut":
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)
                else:
                    self.wfile.write(body)

    return Handler


class _Server(http.server.ThreadingHTTPServer):
    """A server of a thread for each request."""

    daemon_threads = True
    # Connections that may wait. With the 5 of socketserver, the system drops some of 16 at once for a second.
    request_queue_size = 64


@contextlib.contextmanager
def web_server() -> Iterator[WebFiles]:
    """A web server on this machine, with nothing on it."""
    files = WebFiles()
    server = _Server(("127.0.0.1", 0), _handler(files))
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A process that serves S3 from memory; yields its address. It has the bucket `bucket`."""
    pytest.importorskip("moto")
    pytest.importorskip("flask_cors")
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, "moto's server has ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=1).close()
                break
            time.sleep(0.1)
        put(url, "bucket", b"")
        yield url
    finally:
        process.kill()
        process.wait()


def put(url: str, path: str, content: bytes) -> None:
    """Write an object, or make a bucket (a path without `/`)."""
    request = urllib.request.Request(f"{url}/{path}", data=content, method="PUT", headers=_SIGNED)
    urllib.request.urlopen(request, timeout=10).close()


def remove(url: str, path: str) -> None:
    """Remove an object."""
    urllib.request.urlopen(
        urllib.request.Request(f"{url}/{path}", method="DELETE", headers=_SIGNED), timeout=10
    ).close()


# moto looks at no signature, but only what has one is for S3.
_SIGNED = {
    "Content-Type": "application/octet-stream",
    "Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, Signature=0",
}


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def s3_environment(url: str) -> dict[str, str]:
    """Variables with which every client of S3 speaks to that server."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**os.environ, "AWS_ENDPOINT_URL": url, **keys}


@contextlib.contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[str]:
    """A server with the part of Hugging Face's interface that reading the dataset `owner/name` takes."""
    server = _Server(("127.0.0.1", 0), _hub_handler(files))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _hub_handler(files: dict[str, bytes]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            path, _, query = self.path.partition("?")
            place = path.removeprefix("/api/datasets/owner/name")
            if place in ("", "/revision/main"):
                self._send(200, json.dumps({"id": "owner/name", "sha": "c" * 40, "siblings": []}).encode())
            elif place.startswith("/tree/main"):
                folder = place.removeprefix("/tree/main").strip("/")
                self._send(200, json.dumps(list(_entries(files, folder, "recursive=true" in query.lower()))).encode())
            elif path.startswith("/datasets/owner/name/resolve/main/"):
                self._content(files.get(path.removeprefix("/datasets/owner/name/resolve/main/")))
            else:
                self._send(404, b"{}")

        def _content(self, content):
            if content is None:
                return self._send(404, b"{}")
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self._send(206, content[int(first) : int(last) + 1])

        def _send(self, status, body):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _entries(files: dict[str, bytes], folder: str, is_recursive: bool) -> Iterator[dict[str, object]]:
    """What is in a folder of the dataset; its Parquet files are kept by git-lfs."""
    folders = set()
    for name, content in files.items():
        if folder and not name.startswith(f"{folder}/"):
            continue
        inner, _, rest = name.removeprefix(f"{folder}/" if folder else "").partition("/")
        if rest and not is_recursive:
            path = f"{folder}/{inner}".strip("/")
            if path not in folders:
                folders.add(path)
                yield {"type": "directory", "path": path, "oid": "d" * 40, "size": 0}
            continue
        entry = {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        if name.endswith(".parquet"):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        yield entry
