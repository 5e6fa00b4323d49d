"""Whether files that are to be held out are among those that are trained on."""

import os
from collections.abc import Iterable

from etils import epath

from hybridnorm_jax.config.run_config import DataSection
from hybridnorm_jax.data.identity import identities
from hybridnorm_jax.data.sources import find_files, stdlib_corpus
from hybridnorm_jax.errors import DataError

TRAINING_SET = "train"


def shared_files(training: Iterable[epath.Path], others: Iterable[epath.Path]) -> tuple[epath.Path, ...]:
    """Those of `others` that are training files, also under another spelling, through a symbolic or a hard link."""
    known = {_key(path) for path in training}
    return tuple(path for path in others if _key(path) in known)


def check_apart(data: DataSection) -> None:
    """Raise DataError if a file of a set in data.validation is trained on, or has a training file's content.

    A set whose name begins with "train" says itself that it is trained on.
    """
    others = {
        name: find_files(f"data.validation.{name}", files)
        for name, files in data.validation.items()
        if not name.startswith(TRAINING_SET)
    }
    if not others:
        return
    training = [file.path for file in stdlib_corpus().files]
    if data.source != "stdlib":
        training = find_files("data.files", data.files)
    contents = {(one.size, one.digest): path for path, one in zip(training, identities(training), strict=True)}
    for name, paths in others.items():
        right = f"name others, or say so in the name of the set, data.validation.{TRAINING_SET}_{name}"
        for path in shared_files(training, paths):
            raise DataError(f"data.validation.{name}: {path} is in data.files too, so it is trained on; {right}")
        for path, one in zip(paths, identities(paths), strict=True):
            copy = contents.get((one.size, one.digest))
            if copy is not None:
                wrong = f"{path} has the content of {copy}, which is trained on"
                raise DataError(f"data.validation.{name}: {wrong}; {right}")


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
