"""Where tokenized text is kept, also where there is no home directory, or none that can be written to."""

import contextlib
import errno
import os
import pathlib
import stat
import sys
import tempfile
from collections.abc import Iterator

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.errors import DataError

DEFAULT = DataSection().cache_dir


def cache_root(cache_dir: str, wanted: str) -> pathlib.Path:
    """The directory that data.cache_dir names.

    Instead of the default it may be one in the temporary directory; then a line on standard error says so.

    Args:
      wanted: the cache in it that is asked for. Where it exists, nothing needs to be written.

    Raises:
      DataError: the directory is below a home directory that is not known, or there is none to write to.
    """
    try:
        root = pathlib.Path(cache_dir).expanduser()
    except RuntimeError as error:  # no HOME, and no entry for this user in the system's list
        if cache_dir != DEFAULT:
            raise DataError(f"data.cache_dir={cache_dir}: this user has no home directory; name another one") from error
        return _temporary_root("this user has no home directory")
    if cache_dir == DEFAULT and not _is_usable(root, wanted):
        return _temporary_root("it cannot be written to")
    return root


@contextlib.contextmanager
def refusals_of_cache(root: pathlib.Path) -> Iterator[None]:
    """Within the block, a cache that cannot be written or read is a DataError that names data.cache_dir."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left" if full else f"cannot be used ({error.strerror or error})"
        raise DataError(f"data.cache_dir={root}: {reason}; name another directory, or make room there") from error


def _is_usable(root: pathlib.Path, wanted: str) -> bool:
    try:
        if (root / wanted).exists():
            return True
        nearest = next(parent for parent in (root, *root.parents) if parent.exists())
    except PermissionError:  # of a directory above it
        return False
    return os.access(nearest, os.W_OK | os.X_OK)


def _temporary_root(reason: str) -> pathlib.Path:
    """A directory of this user's own."""
    root = pathlib.Path(tempfile.gettempdir()) / f"hybridnorm_jax-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise DataError(f"data.cache_dir={DEFAULT}: {reason}, nor can {root}; name another directory") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise DataError(f"data.cache_dir={DEFAULT}: {reason}, and {root} is another user's; name another directory")
    print(f"data.cache_dir={DEFAULT}: {reason}; tokenized text is kept in {root}", file=sys.stderr)
    return root
