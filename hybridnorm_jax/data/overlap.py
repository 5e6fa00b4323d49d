"""Whether files that are to be held out are among those that are trained on."""

import os
from collections.abc import Iterable, Sequence

from etils import epath

from hybridnorm_jax.data.identity import FileIdentity
from hybridnorm_jax.data.sources import find_files
from hybridnorm_jax.errors import DataError


def shared_files(training: Iterable[epath.Path], others: Iterable[epath.Path]) -> tuple[epath.Path, ...]:
    """Those of `others` that are training files, also under another spelling, through a symbolic or a hard link."""
    known = {_key(path) for path in training}
    return tuple(path for path in others if _key(path) in known)


def check_apart(
    training: Sequence[epath.Path],
    identities: Sequence[FileIdentity],
    sets: dict[str, tuple[Sequence[epath.Path], Sequence[FileIdentity]]],
) -> None:
    """Raise DataError if a file of a validation set is trained on, or has a training file's content.

    Args:
      training: the files of data.files.
      identities: theirs.
      sets: name in data.validation -> (its files, their identities).
    """
    contents = {(one.size, one.digest): path for path, one in zip(training, identities, strict=True)}
    for name, (paths, own) in sets.items():
        for path in shared_files(training, paths):
            raise DataError(f"data.validation.{name}: {path} is in data.files too, so it is trained on; name others")
        for path, one in zip(paths, own, strict=True):
            copy = contents.get((one.size, one.digest))
            if copy is not None:
                wrong = f"{path} has the content of {copy}, which is trained on"
                raise DataError(f"data.validation.{name}: {wrong}; name files that are not in data.files")


def shared_patterns(training: Iterable[str], others: Iterable[str]) -> tuple[epath.Path, ...]:
    """shared_files of paths and glob patterns.

    Raises:
      DataError: a pattern that names no file.
    """
    return shared_files(find_files("data.files", training), find_files("data.validation", others))


def _key(path: epath.Path) -> tuple[int, int] | str:
    if "://" in os.fspath(path):
        return os.fspath(path)
    status = os.stat(path)
    return status.st_dev, status.st_ino
