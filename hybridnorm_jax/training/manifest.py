"""A manifest of digests: the last thing written into a checkpoint, and what its files are compared with before use.

DIRECTORY/manifest/P-of-N.json is the part of process P of N: size and SHA-256 of every N-th file of the sorted list,
from the P-th on, and a digest of the part itself. The manifest is complete once all N parts are there. Process 0 looks
for the parts of all others before it writes its own, and so the others need to look for that one alone: what they ask a
bucket grows with their number and not with its square. Restoring may divide the files differently. Nothing here knows
Orbax.

While process P writes its part, and until all parts are there, it keeps a mark P.unfinished beside them: so a save that
was killed is told from a checkpoint that has lost a part. Files that no part names are of no concern: file systems and
desktops leave their own everywhere.
"""

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from hybridnorm_jax.whole_files import is_local, size_of, write_whole

FOLDER = "manifest"
PART = re.compile(r"(\d+)-of-(\d+)\.json")
UNFINISHED = ".unfinished"
# What systems, desktops and editors leave in any directory, and take away again; it is in no manifest.
FOREIGN = re.compile(
    r"\.DS_Store|\._.*|\.nfs.*|\.fuse_hidden.*|Thumbs\.db|desktop\.ini|lost\+found|.*~|#.*#|\.#.*|\..*\.sw[a-p]"
)
# hashlib releases the GIL, so the threads of one process share its cores; together they hold 32 MiB.
THREADS, CHUNK_BYTES = 8, 2**22
# How long a process that has written its part waits for those of the others.
PARTS_TIMEOUT_SECONDS = 1800
# What `agree` sends of a line, in bytes.
LINE_BYTES = 512


def write_all_parts(
    directory: epath.PathLike, *, index: int, count: int, seconds: float = PARTS_TIMEOUT_SECONDS
) -> None:
    """Write the part of process `index`, and return once the parts of all `count` processes are there.

    Raises:
      OSError: as write_part.
      TimeoutError: a part of another process is not there after so many seconds; names the first such process.
    """
    if index == 0:
        others = functools.partial(_wait_for_parts, directory, range(1, count), count=count, seconds=seconds)
        write_part(directory, index=index, count=count, first=others)
    else:
        write_part(directory, index=index, count=count)
        _wait_for_parts(directory, [0], count=count, seconds=seconds)
    _mark(epath.Path(directory), index).unlink(missing_ok=True)


def write_part(directory: epath.PathLike, *, index: int, count: int, first: Callable[[], None] = lambda: None) -> None:
    """Hash process `index`'s share of all files in `directory` and write its part, whole or not at all.

    Its mark stays.

    Args:
      directory: what is in it must not change any more, apart from its manifest.
      index, count: this process's number and how many there are.
      first: called when all is hashed, before the part is written.

    Raises:
      OSError: a file cannot be read, or the part cannot be written.
    """
    directory = epath.Path(directory)
    (directory / FOLDER).mkdir(exist_ok=True)
    _mark(directory, index).write_text("")
    names = _files(directory)[index::count]
    with ThreadPoolExecutor(THREADS) as pool:
        entries = dict(zip(names, pool.map(lambda name: _entry(directory / name), names), strict=True))
    part = {"digest": _digest_of(entries), "files": entries}
    first()
    write_whole(part_path(directory, index, count), json.dumps(part))


def part_path(directory: epath.PathLike, index: int, count: int) -> epath.Path:
    """Where process `index` of `count` writes its part."""
    return epath.Path(directory) / FOLDER / f"{index}-of-{count}.json"


def _wait_for_parts(directory: epath.PathLike, missing: Sequence[int], *, count: int, seconds: float) -> None:
    """Until the parts of these of `count` processes are there; TimeoutError names the first that is not."""
    pause, give_up = 0.01, time.monotonic() + seconds

    def exists(index: int) -> bool:
        return part_path(directory, index, count).exists()

    with ThreadPoolExecutor(THREADS) as pool:
        while missing := [index for index, there in zip(missing, pool.map(exists, missing), strict=True) if not there]:
            if time.monotonic() > give_up:
                raise TimeoutError(f"process {missing[0]} wrote no digests within {seconds} seconds")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


def remove(directory: epath.PathLike) -> None:
    """Delete every part, if there are any: without them the directory is no checkpoint."""
    directory = epath.Path(directory)
    if names := _part_names(directory):
        _mark(directory, 0).write_text("")
    for name in sorted(names):
        (directory / FOLDER / name).unlink(missing_ok=True)


def is_complete(directory: epath.PathLike) -> bool:
    """Whether every part of the manifest is there, by name."""
    return _count(epath.Path(directory)) is not None


def is_unfinished(directory: epath.PathLike) -> bool:
    """Whether a process is writing the manifest, or was killed while it did, or while it deleted the checkpoint."""
    return any(name.endswith(UNFINISHED) for name in _names(epath.Path(directory)))


def has_lost_parts(directory: epath.PathLike) -> bool:
    """Whether some parts of the manifest are there and others are not, although it was finished once."""
    directory = epath.Path(directory)
    return bool(_part_names(directory)) and not is_complete(directory) and not is_unfinished(directory)


def _count(directory: epath.Path) -> int | None:
    """Of how many parts the manifest is; None where it is not complete."""
    present = _part_names(directory)
    counts = {int(PART.fullmatch(name)[2]) for name in present}

    def has(index: int, count: int) -> bool:
        path = part_path(directory, index, count)
        # A listing of an object store may be older than the part.
        return path.name in present or path.exists()

    return max((count for count in counts if all(has(index, count) for index in range(count))), default=None)


def find_damage(directory: epath.PathLike, *, index: int, count: int) -> str | None:
    """The first file of the manifest that is not as it was, in process `index`'s share of `count`, or None.

    Every process looks for all files, and compares sizes and digests of its share. Files that the manifest does not
    name are passed over; a link that leads out of the directory is damage, wherever it leads.

    Returns:
      "FILE: what is wrong with it", the file relative to `directory`; one line.
    """
    directory = epath.Path(directory)
    try:
        if (line := leading_out(directory)) is not None:
            return line
        expected, present = _read_parts(directory), set(_files(directory))
    except _DamagedPartError as error:
        return str(error)
    except OSError as error:
        return f"cannot be listed: {error.strerror or type(error).__name__}"
    for name in sorted(expected.keys() - present):
        return f"{name}: is missing"
    names = sorted(expected)[index::count]
    with ThreadPoolExecutor(THREADS) as pool:
        compare = functools.partial(_difference, directory)
        try:
            found = pool.map(compare, names, (expected[name] for name in names))
            return next((line for line in found if line is not None), None)
        finally:
            pool.shutdown(cancel_futures=True)


def find_damage_of(directory: epath.PathLike, name: str) -> str | None:
    """As `find_damage`, of one file alone; None also where the manifest is not complete, as that of older versions."""
    directory = epath.Path(directory)
    if not is_complete(directory):
        return leading_out(directory)
    try:
        if (line := leading_out(directory)) is not None:
            return line
        expected = _read_parts(directory)
    except _DamagedPartError as error:
        return str(error)
    return _difference(directory, name, expected[name]) if name in expected else f"{name}: is not in the manifest"


def leading_out(directory: epath.PathLike) -> str | None:
    """What is said of the first symbolic link in a local directory that leads out of it; None: there is none.

    A checkpoint may be a stranger's, and its links may name any file here.
    """
    if not is_local(directory):
        return None
    root = os.path.realpath(directory)
    for folder, folders, files in os.walk(root):
        for name in sorted([*folders, *files]):
            path = os.path.join(folder, name)
            if os.path.islink(path) and os.path.commonpath([root, os.path.realpath(path)]) != root:
                link = os.path.relpath(path, root)
                return f"{link}: is a link out of the checkpoint, which is not followed; copy the file itself there"
    return None


def agree(line: str | None) -> str | None:
    """The line of the first process that has one, in every process; None if none has. All processes call it."""
    if jax.process_count() == 1:
        return line
    mine = np.zeros(LINE_BYTES, np.uint8)
    text = (line or "").encode()[:LINE_BYTES]
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    return first_line(multihost_utils.process_allgather(mine))


def first_line(gathered: np.ndarray) -> str | None:
    """The first row of (processes, LINE_BYTES) bytes that is not all zero, as text; None if there is none."""
    rows = (bytes(row).rstrip(b"\0") for row in np.asarray(gathered, np.uint8))
    return next((row.decode(errors="replace") for row in rows if row), None)


class _DamagedPartError(Exception):
    """A part that is not as it was written; says which and why."""


def _files(directory: epath.Path) -> list[str]:
    """Every file below `directory` but the manifest's and foreign ones, relative to it, sorted."""
    return sorted(name for name in _walk(directory, "") if not name.startswith(f"{FOLDER}/"))


def _walk(directory: epath.Path, prefix: str) -> Iterator[str]:
    # epath's own walk() loses "gs://" where fsspec reads the bucket.
    for path in directory.iterdir():
        # The first is the placeholder that stands for a directory on an object store.
        if path == directory or FOREIGN.fullmatch(path.name):
            continue
        if path.is_dir():
            if os.path.islink(path):  # it may lead to where it is
                continue
            yield from _walk(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _mark(directory: epath.Path, index: int) -> epath.Path:
    return directory / FOLDER / f"{index}{UNFINISHED}"


def _names(directory: epath.Path) -> set[str]:
    try:
        return {path.name for path in (directory / FOLDER).iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _part_names(directory: epath.Path) -> set[str]:
    return {name for name in _names(directory) if PART.fullmatch(name)}


def _entry(path: epath.Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _difference(directory: epath.Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with one file that is there, or None."""
    try:
        if is_local(directory) and not os.path.isfile(directory / name):
            return f"{name}: is no file"  # a pipe may never end, or never begin
        size = size_of(directory / name)
        if size != expected["bytes"]:
            kind = "truncated" if size < expected["bytes"] else "damaged"
            return f"{name}: has {size:,} bytes, but {expected['bytes']:,} in the manifest: {kind}"
        if _entry(directory / name) != expected:
            return f"{name}: its digest is not the manifest's: damaged"
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror or type(error).__name__}"
    return None


def _read_parts(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """{file: its size and digest} of all parts, without foreign files; raises _DamagedPartError."""
    files: dict[str, dict[str, Any]] = {}
    count = _count(directory)
    if count is None:
        count = max((int(PART.fullmatch(name)[2]) for name in _part_names(directory)), default=0)
    for index in range(count):
        path = part_path(directory, index, count)
        try:
            part = json.loads(path.read_bytes())
            if part["digest"] != _digest_of(part["files"]) or not all(map(_is_entry, part["files"].values())):
                raise ValueError
            files |= part["files"]
        except FileNotFoundError as error:
            raise _DamagedPartError(f"{FOLDER}/{path.name}: is missing") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise _DamagedPartError(f"{FOLDER}/{path.name}: cannot be read: {reason}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _DamagedPartError(f"{FOLDER}/{path.name}: is not as it was written: damaged") from error
    # An earlier version listed foreign files, too.
    return {name: entry for name, entry in files.items() if not any(map(FOREIGN.fullmatch, name.split("/")))}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def _digest_of(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
