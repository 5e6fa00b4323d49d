"""Copies of remote files on this machine's disk, which take a bounded number of bytes.

    <data.cache_dir>/remote/
        <key>-<size>/<name>       a whole copy; its time is that of its last use
        <key>-<size>.<owner>/     one that is being fetched, or was when its process ended
        owners/<owner>            what a process uses (in_use.py)
        locks/                    of the folder, and of the keys that are being fetched

The key is made of the address and the version of a file, so that another version is another copy. A copy gets its name
when it is whole and has been checked. Where there is no room for another one, those go first that were used longest
ago, and never one that a process uses. The functions for one copy are in the order in which they happen.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.places.cache_directory import cache_root, refusals_of_cache
from hybridnorm_jax.data.places.in_use import Owner
from hybridnorm_jax.data.places.remote_file import Place, RemoteFile
from hybridnorm_jax.data.places.store import store_of
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.streams import can_redraw

FOLDER = "remote"
FETCHERS = 8
# Files that are fetched while the one before them is read.
AHEAD = 2
# Between two looks at a lock that another process has.
POLL_SECONDS = 0.01
# Locks of keys: so few that none needs ever be removed.
STRIPES = 64
GIB = 1 << 30
Counter = Callable[[int], object]  # is told of every piece that has come
_COPY = re.compile(r"[0-9a-f]{24}-(\d+)(\..+)?")


class NoRoomError(DataError):
    """All the room for copies is in use."""


class LocalCopies:
    """The copies in one folder, for one run or command. What it holds is given back when its process ends."""

    def __init__(self, cache_dir: str, limit: int, *, progress: bool = False):
        """Nothing is made before the first file is fetched.

        Args:
          cache_dir: data.cache_dir.
          limit: bytes that all copies together may take.
          progress: whether to show what is being fetched on standard error.
        """
        self._cache_dir = cache_dir
        self._limit = limit
        self._progress = progress
        self._owner: tuple[int, Owner] | None = None
        self._guard = threading.Lock()
        self._one_thread = threading.Lock()
        self._coming: dict[str, concurrent.futures.Future[RemoteFile]] = {}
        self._root: Path | None = None

    def fetched(self, places: Sequence[Place]) -> tuple[Place, ...]:
        """The same places, each one readable on this machine; they stay so as long as the process lives.

        So are the files beside them (RemoteFile.beside).

        Raises:
          DataError: a file cannot be read, or there is no room for all of them.
        """
        named = [place for place in places if isinstance(place, RemoteFile)]
        remote = named + [companion for file in named for companion in file.beside]
        if not remote:
            return tuple(places)
        total = sum(file.size for file in remote)
        if total > self._limit:
            what = f"{len(remote)} files that a run reads in any order take {total / GIB:.3g} GiB"
            right = f"set data.cache_gib to at least {total / GIB:.3g}, with so much room in data.cache_dir"
            raise DataError(f"data.cache_gib={self._limit / GIB:g}: {what}; {right}")
        shows_bar = self._progress and can_redraw(sys.stderr)
        stop = threading.Event()
        bar = tqdm(total=total, desc="fetching", unit="B", unit_scale=True, leave=False, disable=not shows_bar)
        with bar, concurrent.futures.ThreadPoolExecutor(FETCHERS) as pool:
            if self._progress and not shows_bar:
                print(f"fetching {len(remote)} files, {total:,} bytes", file=sys.stderr, flush=True)
            waiting = [pool.submit(self._fetch, file, stop, bar.update) for file in remote]
            try:
                copies = {file.url: future.result() for file, future in zip(remote, waiting, strict=True)}
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        for file in named:
            beside = tuple(copies[companion.url] for companion in file.beside)
            copies[file.url] = dataclasses.replace(copies[file.url], beside=beside)
        return tuple(copies.get(os.fspath(place), place) for place in places)

    @contextlib.contextmanager
    def held(self, place: Place, then: Sequence[Place] = ()) -> Iterator[Place]:
        """The same place, readable on this machine while the context lasts.

        Args:
          place: of the file.
          then: what will be held next. The first of them, if remote, are fetched in the meantime, if there is room.

        Raises:
          DataError: as `fetched`.
        """
        if not isinstance(place, RemoteFile):
            yield place
            return
        copy = self._arrived(place)
        following = [file for file in then[:AHEAD] if isinstance(file, RemoteFile)]
        if place.size + sum(file.size for file in following) <= self._limit:
            for file in following:
                self._send_for(file)
        try:
            yield copy
        finally:
            self._give_back(place)

    def _send_for(self, file: RemoteFile) -> None:
        """Fetch a file in a thread of its own, if nobody does yet."""
        if file.url in self._coming:
            return
        coming: concurrent.futures.Future[RemoteFile] = concurrent.futures.Future()
        self._coming[file.url] = coming

        def fetch() -> None:
            try:
                coming.set_result(self._fetch(file, threading.Event(), lambda count: None))
            except BaseException as error:
                coming.set_exception(error)

        # No thread for which the end of the program would wait.
        threading.Thread(target=fetch, daemon=True, name="a copy that is needed soon").start()

    def _arrived(self, file: RemoteFile) -> RemoteFile:
        """The copy of a file that may have been sent for."""
        with contextlib.suppress(NoRoomError):  # there was none while the file before it was in use
            if coming := self._coming.pop(file.url, None):
                return coming.result()
            return self._fetch(file, threading.Event(), lambda count: None)
        self._call_off()
        return self._fetch(file, threading.Event(), lambda count: None)

    def _call_off(self) -> None:
        """Give back what was sent for: it may have taken the room of what is needed now."""
        for coming in self._coming.values():
            with contextlib.suppress(DataError):
                self._give_back(coming.result())
        self._coming.clear()

    def _give_back(self, file: RemoteFile) -> None:
        with self._locked():
            self._own().give_back(_key(file, self._own()))

    def _own(self) -> Owner:
        """This process's owner: a child of a process that was forked is another one."""
        with self._guard:
            if self._owner is None or self._owner[0] != os.getpid():
                self._owner = (os.getpid(), Owner(self._folder() / "owners"))
            return self._owner[1]

    def _folder(self) -> Path:
        if self._root is None:
            root = cache_root(self._cache_dir, FOLDER) / FOLDER
            with refusals_of_cache(root):
                (root / "locks").mkdir(parents=True, exist_ok=True)
            self._root = root
        return self._root

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other thread or process changes which copies there are. Threads wait for each other without polling."""
        lock = FileLock(self._folder() / "locks" / "folder", thread_local=False, poll_interval=POLL_SECONDS)
        with self._one_thread, lock:
            yield

    def _fetch(self, file: RemoteFile, stop: threading.Event, count: Counter) -> RemoteFile:
        with refusals_of_cache(self._folder()):
            owner = self._own()
            key = _key(file, owner)
            copy = self._folder() / key / _safe_name(file)
            with FileLock(
                self._folder() / "locks" / str(int(key[:8], 16) % STRIPES),
                thread_local=False,
                poll_interval=POLL_SECONDS,
            ):
                if self._take_known(owner, key, copy, file):
                    count(file.size)
                else:
                    self._take_new(owner, key, copy, file, stop, count)
        return dataclasses.replace(file, copy=copy)

    def _take_known(self, owner: Owner, key: str, copy: Path, file: RemoteFile) -> bool:
        """Take a copy that is there; one that somebody has damaged is removed unless it is in use."""
        with self._locked():
            try:
                whole = copy.stat().st_size == file.size
            except (FileNotFoundError, NotADirectoryError):
                return False
            if not whole:
                if key in owner.in_use():
                    raise DataError(f"{copy}: was changed while a process uses it; end that process, and start again")
                shutil.rmtree(copy.parent)
                return False
            owner.take(key)
            os.utime(copy.parent)
            return True

    def _take_new(
        self, owner: Owner, key: str, copy: Path, file: RemoteFile, stop: threading.Event, count: Counter
    ) -> None:
        """Fetch a copy into a folder of our own, which gets its name when it is whole."""
        partial = copy.parent.with_name(f"{key}.{owner.name}")
        try:
            with self._locked():
                self._make_room(owner, file)
                partial.mkdir()
            _download(file, partial / copy.name, stop, count)
            with self._locked():
                owner.take(key)
                os.rename(partial, copy.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, owner: Owner, file: RemoteFile) -> None:
        """Remove what ended processes have left, and as many copies as must go for this one."""
        living = owner.living()
        copies: dict[Path, int] = {}
        coming = 0
        for entry in os.scandir(self._folder()):
            match = _COPY.fullmatch(entry.name)
            if match is None:
                continue
            if match.group(2) is None:
                copies[Path(entry.path)] = int(match.group(1))
            elif match.group(2)[1:] in living:
                coming += int(match.group(1))
            else:
                shutil.rmtree(entry.path)
        excess = sum(copies.values()) + coming + file.size - self._limit
        lacking = file.size - shutil.disk_usage(self._folder()).free
        if max(excess, lacking) <= 0:
            return
        in_use = owner.in_use()
        free = sorted((path for path in copies if path.name not in in_use), key=lambda path: path.stat().st_mtime_ns)
        for path in free:
            if max(excess, lacking) <= 0:
                return
            shutil.rmtree(path)
            excess -= copies[path]
            lacking -= copies[path]
        if lacking > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if excess > 0:
            others = sum(size for path, size in copies.items() if path.name in in_use) + coming
            wrong = f"no room for {file} ({file.size:,} bytes): {others:,} bytes are in use"
            raise NoRoomError(f"data.cache_gib={self._limit / GIB:g}: {wrong}; raise it")


def copies_of(section: DataSection, *, progress: bool = False) -> LocalCopies:
    """The copies that a data section's files are read from."""
    return LocalCopies(section.cache_dir, round(section.cache_gib * GIB), progress=progress)


def _key(file: RemoteFile, owner: Owner) -> str:
    # Without a version nobody can know whether a copy is still right: it serves its own process alone.
    version = file.version or owner.name
    digest = hashlib.sha256("\0".join((file.url, version)).encode(errors="surrogateescape")).hexdigest()
    return f"{digest[:24]}-{file.size}"


def _safe_name(file: RemoteFile) -> str:
    """The file's name as one part of a local path: readers look at how it ends, and messages show it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)[-100:]
    return name if name.strip(".") else "content"


def _download(file: RemoteFile, target: Path, stop: threading.Event, count: Counter) -> None:
    """Write a file's content, checked against its size, its version and, where the store states one, its digest."""
    store = store_of(file.url)
    kind, _, expected = file.checksum.partition(":")
    digest = hashlib.new(kind) if kind else None
    length = 0
    with open(target, "xb") as stream:
        for piece in store.pieces(file, 0):
            if stop.is_set():
                raise DataError(f"{file}: not fetched, because another file could not be")
            stream.write(piece)
            length += len(piece)
            count(len(piece))
            if digest is not None:
                digest.update(piece)
    if store.find(file.url) != [file]:  # a server may send a file that is overwritten, half old and half new
        right = "start again with files that nobody writes to"
        raise DataError(f"{file}: was changed or removed while it was read; {right}")
    if length != file.size:
        raise DataError(f"{file}: {length:,} bytes came, but its store says {file.size:,}")
    if digest is not None and digest.hexdigest() != expected:
        raise DataError(f"{file}: what came has another {kind} than its store says; it was damaged on the way")
