"""One run directory, one run: a lock that is held while a run trains, and names who holds it.

On a file system it is flock on the file `lock` of the run directory. The system releases it with the process, however
the process ends; on NFS the server does, which takes up to its lease time if the whole machine is lost. Where flock is
not supported, and in a bucket, `lock` is an object that the holder writes again every BEAT_SECONDS: one that has not
changed for LEFT_OVER_SECONDS, as seen from here, was left by a process that has ended. Clocks are never compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import sys
import threading
import time
import weakref
from pathlib import Path

import fsspec
import jax
from etils import epath

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.lock_holder import NAME, holder, holder_text, is_of_ended_process
from hybridnorm_jax.training.manifest import agree
from hybridnorm_jax.whole_files import is_local, write_whole

BEAT_SECONDS, LEFT_OVER_SECONDS, SETTLE_SECONDS = 10.0, 60.0, 3.0
# What flock says on a file system without it.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class RunLock:
    """A context in which no other run trains in this directory; makes the directory where it is new.

    With several processes process 0 holds the lock for all of them, and all of them enter together.

    Args:
      directory: local or in a bucket.

    Raises:
      UserError: on entering, in every process, if another run holds the lock or the directory cannot be made.
    """

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._lock: _FileLock | _HeartbeatLock | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "RunLock":
        refusal = self._acquire() if jax.process_index() == 0 else None
        if refusal := agree(refusal):
            raise UserError(refusal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
        # Nothing is left of a run that was refused before it wrote anything.
        for directory in self._made:
            with contextlib.suppress(OSError):
                directory.rmdir()

    def raise_if_lost(self) -> None:
        """Raise UserError where another run has taken over a lock that was not written again in time."""
        if isinstance(self._lock, _HeartbeatLock) and self._lock.is_lost:
            raise UserError(f"{self._directory}: another run has taken it over; this one ends, what was saved stays")

    def _acquire(self) -> str | None:
        """Take the lock; None, or why not in one line."""
        try:
            self._make_directory()
            if is_local(self._directory):
                try:
                    self._lock = _FileLock(Path(self._directory).absolute() / NAME)
                except OSError as error:
                    if error.errno not in UNSUPPORTED:
                        raise
            if self._lock is None:
                self._lock = _HeartbeatLock(self._directory / NAME)
        except _HeldError as held:
            return f"{self._directory}: in use by {held}; end that run first, or choose another run.name"
        except OSError as error:
            file = error.filename or self._directory / NAME
            if isinstance(error, FileExistsError):
                return f"{file}: cannot be made a run's directory, it is no directory"
            return f"{file}: cannot be written: {error.strerror or error}"
        return None

    def _make_directory(self) -> None:
        if not is_local(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            return
        path = Path(self._directory).absolute()
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._made = missing


class _HeldError(Exception):
    """Another process has the lock; says which."""

    def __init__(self, content: bytes):
        super().__init__(holder_text(content))


class _FileLock:
    """flock on a file that is held open and removed at the end."""

    def __init__(self, path: Path):
        self._path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_in_place():
                    break
                os.close(self._file)  # the one before has removed it in this moment
            except BaseException as error:
                content = os.read(self._file, 1000)
                if isinstance(error, OSError) and error.errno in UNSUPPORTED and not content:
                    path.unlink()  # made just now; _HeartbeatLock would take it for another process's
                os.close(self._file)
                if isinstance(error, BlockingIOError):
                    raise _HeldError(content) from error
                raise
        _held.add(self)
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps(holder()).encode())

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file while it is locked, so that nobody waits for it."""
        with contextlib.suppress(OSError):
            if self._is_in_place():
                self._path.unlink()
        os.close(self._file)
        _held.discard(self)

    def forget(self) -> None:
        """Close the file in a child of this process, which would otherwise hold the lock after it."""
        os.close(self._file)


_held: weakref.WeakSet[_FileLock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_held):
        lock.forget()
    _held.clear()


# What is started anew (exec) does not inherit the file.
os.register_at_fork(after_in_child=_forget_locks)


class _HeartbeatLock:
    """A file or an object that a thread writes again and again.

    It is made only where there is none, as far as the storage can promise that (on GCS it can). A lock that was left
    over is written over; if two processes do so in the same moment, the later one has it, and the other sees that.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._files, self._name = fsspec.core.url_to_fs(os.fspath(path))
        self._content = holder() | {"token": secrets.token_hex(8), "beat": 0}
        self.is_lost = False
        self._over = threading.Event()
        if not self._create():
            self._wait_until_left_over()
            self._write()
            time.sleep(SETTLE_SECONDS)
            if not self._is_ours():
                raise _HeldError(self._read() or b"")
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def _create(self) -> bool:
        """Make the object if there is none."""
        try:
            if is_local(self._path):
                with open(self._path, "xb") as file:
                    file.write(self._encoded())
            else:
                self._files.pipe_file(self._name, self._encoded(), mode="create")
        except FileExistsError:
            return False
        return True

    def _wait_until_left_over(self) -> None:
        """Until the object has not changed for LEFT_OVER_SECONDS, or is gone; _HeldError as soon as it changes."""
        first = self._read()
        if first is None or is_of_ended_process(first):
            return
        print(
            f"{self._path}: {_HeldError(first)} may hold this run; known within {LEFT_OVER_SECONDS:g} seconds",
            file=sys.stderr,
        )
        give_up = time.monotonic() + LEFT_OVER_SECONDS
        while time.monotonic() < give_up:
            time.sleep(min(BEAT_SECONDS / 2, LEFT_OVER_SECONDS / 4))
            now = self._read()
            if now is None:
                return
            if now != first:
                raise _HeldError(now)

    def _read(self) -> bytes | None:
        try:
            return self._files.cat_file(self._name)
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        if is_local(self._path):
            write_whole(self._path, self._encoded().decode(), concurrent=True)
        else:
            self._files.pipe_file(self._name, self._encoded())

    def _encoded(self) -> bytes:
        return json.dumps(self._content).encode()

    def _is_ours(self) -> bool:
        content = self._read()
        return content is not None and self._content["token"].encode() in content

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            # A bucket that does not answer for a while is no reason to end: another run would have to take over first.
            with contextlib.suppress(Exception):
                if not self._is_ours():
                    self.is_lost = True
                    return
                self._content["beat"] += 1
                self._write()

    def release(self) -> None:
        """Remove the object, if it is still ours."""
        self._over.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(Exception):
            if self._is_ours():
                self._files.rm_file(self._name)
