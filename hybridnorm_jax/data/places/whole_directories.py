"""Directories that appear under their name only when they are whole, also where several processes make the same one."""

import contextlib
import errno
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator

PARTIAL = ".partial"


@contextlib.contextmanager
def whole_directory(directory: pathlib.Path, is_whole: Callable[[], bool]) -> Iterator[pathlib.Path]:
    """A directory of our own to write to, which becomes `directory` when the block has ended without an error.

    What ended processes of this machine left unfinished beside it is removed first.

    Args:
      directory: does not exist yet. Where another process is faster, its files stay, and ours are removed.
      is_whole: whether what is there then is whole.

    Raises:
      OSError: something cannot be written, or what another process has made is not whole.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory.parent)
    partial = directory.with_name(f"{directory.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    try:
        partial.mkdir()
        yield partial
        _publish(partial, directory, is_whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(root: pathlib.Path) -> None:
    """Remove what ended processes of this machine, and earlier ones with our own id, left unfinished."""
    for path in root.glob(f"*{PARTIAL}"):
        host, _, process = path.name.removesuffix(PARTIAL).partition(".")[2].rpartition(".")
        if host == socket.gethostname() and (int(process) == os.getpid() or not _alive(int(process))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(partial: pathlib.Path, directory: pathlib.Path, is_whole: Callable[[], bool]) -> None:
    try:
        os.rename(partial, directory)
    except OSError as error:
        # Another process was faster; its files are those we have written.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_whole():
            raise
