"""Digests of files that were read before, found again without reading the files.

They are kept in the user's cache folder, one JSON file for each list of paths that was asked for. A digest counts as
long as the file has the size, the times of last change, the number (inode) and the device that it had; in a bucket, the
size and the version. A program can set the one time back to hide a change, but not the other (st_ctime).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hybridnorm_jax.data.places.remote_file import Place, RemoteFile
from hybridnorm_jax.whole_files import expanded, user_cache_folder, write_whole

# A file that was changed a moment ago may be changed again without getting another time.
SETTLED_NS = 2 * 10**9
# Of lists of paths. What was written longest ago is removed beyond it.
MOST_KEPT = 200


def digests(paths: Sequence[Place], read: Callable[[Sequence[Place]], Sequence[str]]) -> list[str]:
    """The digest of every file, in order.

    Args:
      paths: as the user has named them.
      read: computes the digests of those of the files that are not known.
    """
    folder = user_cache_folder()
    if folder is None:
        return list(read(paths))
    whole = {path: os.fspath(path) if isinstance(path, RemoteFile) else _absolute(path) for path in paths}
    name = hashlib.sha256("\0".join(whole.values()).encode(errors="surrogateescape")).hexdigest()[:32]
    file = folder / "digests" / f"{name}.json"
    known, now = _kept(file), time.time_ns()
    marks = {whole[path]: _mark(path) for path in paths}
    found = {path: known[path][1] for path, mark in marks.items() if path in known and known[path][0] == mark}
    unknown = [path for path in whole if whole[path] not in found]
    found |= dict(zip((whole[path] for path in unknown), read(unknown), strict=True))
    if any(_is_settled(marks[whole[path]], now) for path in unknown):
        _keep(file, {path: (mark, found[path]) for path, mark in marks.items() if _is_settled(mark, now)})
    return [found[whole[path]] for path in paths]


# Size, times of last change of the content and of the file's entry in nanoseconds, inode, device; of a remote file size
# and version. None: no such file, or no version.
_Mark = list[int] | list[int | str] | None


def _absolute(path: Place) -> str:
    return os.path.abspath(expanded(path))


def _mark(path: Place) -> _Mark:
    if isinstance(path, RemoteFile):
        return [path.size, path.version] if path.version else None
    try:
        status = os.stat(_absolute(path))
    except OSError:  # `read` says why
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _is_settled(mark: _Mark, now: int) -> bool:
    if mark is None:
        return False
    _, *others = mark
    times = [time for time in others[:2] if isinstance(time, int)]
    return all(time < now - SETTLED_NS for time in times)


def _kept(file: Path) -> dict[str, tuple[_Mark, str]]:
    """What a file of digests says; nothing where there is none or it is damaged."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {str(path): (mark, str(digest)) for path, (mark, digest) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(file: Path, entries: Mapping[str, tuple[_Mark, str]]) -> None:
    """Write a file of digests and remove the oldest of too many; a folder that cannot be written is done without."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(entries), concurrent=True)
        kept = sorted(file.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        return
