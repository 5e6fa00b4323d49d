"""Files on a file system or in a bucket: their names and sizes, the user's folder for what can be made again, and how
a file is written whole or not at all.
"""

import os
import pathlib
import secrets

from etils import epath

from hybridnorm_jax.errors import UserError


def is_local(path: epath.PathLike) -> bool:
    """Whether this path is on a file system and not in a bucket such as gs://."""
    return "://" not in os.fspath(path)


def expanded(path: epath.PathLike) -> str:
    """The path as text, with the user's home directory in place of a `~` that begins it.

    Raises:
      UserError: the user has no home directory.
    """
    text = os.fspath(path)
    whole = os.path.expanduser(text)
    if whole == text and (text == "~" or text.startswith("~/")):  # as expanduser leaves it where it knows no home
        raise UserError(f"{text}: this user has no home directory; write the whole path")
    return whole


def user_cache_folder() -> pathlib.Path | None:
    """hybridnorm_jax in the user's cache folder, $XDG_CACHE_HOME or ~/.cache; None where the user has none."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # others are to be ignored, says the XDG Base Directory Specification
        return pathlib.Path(named) / "hybridnorm_jax"
    try:
        return pathlib.Path.home() / ".cache" / "hybridnorm_jax"
    except RuntimeError:  # no HOME, and no entry for this user in the system's list
        return None


def size_of(path: epath.Path) -> int:
    """The bytes of a file; OSError where it cannot be asked.

    `epath.Path.stat` also asks for the name of the file's owner, which the system need not know (as in OpenShift).
    """
    return os.stat(path).st_size if is_local(path) else int(path.stat().length)


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
