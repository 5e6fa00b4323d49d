"""Whether what is called validation was kept out of training."""

import os
from collections.abc import Iterable, Mapping

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data.dataset import source_key
from hybridnorm_jax.data.files.identity import file_identity, regular_file_size
from hybridnorm_jax.data.files.patterns import find_files
from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.data.text.sources import stdlib_corpus
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.whole_files import is_local

# A set whose name begins so says itself that the model was trained on it.
TRAINING_SET = "train"
# The keys that decide which text is trained on, and so what the held-out share is a share of.
TRAINING_DATA = (
    "data.source",
    "data.files",
    "data.mixture",
    "data.text_field",
    "data.filter",
    "data.records",
    "data.chat_template",
    "data.token_dtype",
    "data.separator",
)


def training_files(data: DataSection) -> tuple[Place, ...]:
    """The files that data.files, or the sources of data.mixture, name, or those of the standard library.

    Raises:
      DataError: one of them is not there.
    """
    found: list[Place] = []
    for name, section in data.sources.items():
        if section.source == "stdlib":
            found += [file.path for file in stdlib_corpus().files]
        else:
            found += find_files(source_key(name), section.files)
    return tuple(found)


def check_sets(validation: Mapping[str, Iterable[str]], trained_on: Iterable[Place]) -> None:
    """Refuse validation sets that hold a file which is trained on, unless their name begins with "train".

    The same file is one that both paths lead to, also through links, or one with the same size and content, whatever
    it is called. Two files that hold the same documents in another form (packed, reordered) are not recognized. Of
    large files a sample of the content is compared.

    Args:
      validation: data.validation, name -> paths and patterns.
      trained_on: files.

    Raises:
      ConfigError: names the set and the file.
      DataError: a file of a set is not there.
    """
    held = {
        name: find_files(f"data.validation.{name}", patterns)
        for name, patterns in validation.items()
        if not name.startswith(TRAINING_SET)
    }
    if not held:
        return
    by_place: dict[str, Place] = {}
    by_size: dict[int, list[Place]] = {}
    for path in trained_on:
        by_place.setdefault(_place(path), path)
        by_size.setdefault(regular_file_size(path), []).append(path)
    for name, paths in held.items():
        for path in paths:
            same = by_place.get(_place(path)) or _equal_file(path, by_size.get(regular_file_size(path), ()))
            if same is not None:
                raise ConfigError(_refusal(name, path, same))


def check_share(saved: DataSection, asked: DataSection) -> None:
    """Refuse to hold out another share than the run did: it would hold documents that the run trained on.

    Args:
      saved, asked: the data section of the run, and of this evaluation.

    Raises:
      ConfigError: names the key.
    """
    if asked.validation_fraction and asked.validation_fraction != saved.validation_fraction:
        right = "leave it as it was, or set it to 0 and name sets in data.validation"
        wrong = "only the share that the run held out was kept out of its training"
        change = f"saved {saved.validation_fraction}, asked {asked.validation_fraction}"
        raise ConfigError(f"data.validation_fraction: {change}: {wrong}; {right}")


def check_same_data(asked: DataSection, changes: Iterable[str], *, is_same_data: bool) -> None:
    """Refuse to call "validation" the held-out share of what the run did not train on.

    Args:
      asked: the data section of this evaluation.
      changes: the keys that differ from the run's, such as "data.files: saved [...], asked [...]".
      is_same_data: whether what `asked` names is what the run trained on, maybe at another place.

    Raises:
      ConfigError: names the key.
    """
    changed = [line for line in changes if line.startswith(TRAINING_DATA)]
    if asked.validation_fraction and changed and not is_same_data:
        wrong = "the held-out share of other data is no validation of this run"
        right = "to score other files name them as a set, 'data.validation.NAME=[FILE]'"
        raise ConfigError(f"{changed[0]}: {wrong}; {right}")


def _refusal(name: str, path: Place, trained_on: Place) -> str:
    where = "is trained on" if _place(path) == _place(trained_on) else f"is the same as {trained_on}, trained on"
    right = f"leave it out, or name the set for what it is, data.validation.{TRAINING_SET}_{name}"
    return f"data.validation.{name}: {path} {where}; {right}"


def _place(path: Place) -> str:
    text = os.fspath(path)
    return os.path.realpath(text) if is_local(text) else text


def _equal_file(path: Place, others: Iterable[Place]) -> Place | None:
    """One of the others, of the same size, whose content is the same. Files without content have nothing to score."""
    others = tuple(others)
    if not others or not regular_file_size(path):
        return None
    digest = file_identity(path).digest
    return next((other for other in others if file_identity(other).digest == digest), None)
