"""Files on a file system or in a bucket, and how one is written whole or not at all."""

import os
import secrets

from etils import epath


def is_local(path: epath.PathLike) -> bool:
    """Whether this path is on a file system and not in a bucket such as gs://."""
    return "://" not in os.fspath(path)


def write_whole(path: epath.PathLike, text: str, *, concurrent: bool = False) -> None:
    """Write a text file so that its path always holds all of the old text or all of the new one.

    The text goes to a file beside it first, named PATH.partial, which then takes its place.

    Args:
      path: in a directory that exists; local or gs://.
      concurrent: several processes may write this file at the same time. Each then has a partial file of its own, and
        the last one to finish wins.

    Raises:
      OSError: the file cannot be written; what was there stays.
    """
    path = epath.Path(path)
    suffix = f".{secrets.token_hex(4)}.partial" if concurrent else ".partial"
    partial = path.with_name(path.name + suffix)
    partial.write_text(text)
    partial.replace(path)
