"""What the parameters that a run begins with were trained on: none of it is validation of the run.

A checkpoint holds the identities of the files that were trained on (run_identity.data_files). One without them says
nothing: parameters alone were saved (hn.save_run, `hybridnorm convert`), or a version that kept none has saved it.
"""

from collections.abc import Sequence
from typing import Any

from hybridnorm_jax.config.run_config import DataSection
from hybridnorm_jax.data.identity import identities
from hybridnorm_jax.data.sources import find_files, holds_whole_files_out
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.held_out import TRAINING_SET
from hybridnorm_jax.training.run_identity import TOKENIZER_FILE

Files = Sequence[dict[str, Any]]


def check_tokenizer(saved: Files, now: Files, *, where: str) -> None:
    """Refuse another tokenizer than the parameters were trained with, wherever its file lies.

    Args:
      saved, now: as run_identity.data_files gives them; the tokenizer of bytes is no file.
      where: what was saved, for the message.

    Raises:
      ConfigError: says which of the two has which.
    """
    before, after = (_content_of_tokenizer(files) for files in (saved, now))
    if before == after:
        return
    if before is None or after is None:
        kinds = {True: "bytes", False: "a tokenizer.json"}
        wrong = f"{where} was trained with {kinds[before is None]}, not with {kinds[after is None]}"
    else:
        wrong = f"the file has another content than when {where} was trained"
    raise ConfigError(f"data.tokenizer: {wrong}; name the tokenizer that it was trained with")


def check_validation(saved: DataSection, saved_files: Files, asked: DataSection, files: Files, *, where: str) -> None:
    """Refuse validation sets of what the parameters were trained on.

    Args:
      saved, asked: the data section that they were trained with, and that of the run that begins with them.
      saved_files, files: the files of each, as run_identity.data_files gives them.
      where: what was saved, for the message.

    Raises:
      ConfigError: names the key and the file.
    """
    trained_on = {_content(file) for file in _data(saved_files)}
    shared = [file["name"] for file in _data(files) if _content(file) in trained_on]
    if asked.validation_fraction and shared and not is_kept_out(saved, saved_files, asked, files):
        change = f"data.validation_fraction: saved {saved.validation_fraction}, asked {asked.validation_fraction}"
        right = "hold out what was held out then, or set it to 0 and name other files in data.validation"
        wrong = f"{where} was trained on parts of {shared[0]} that would be held out now"
        raise ConfigError(f"{change}: {wrong}; {right}")
    for name, patterns in asked.validation.items():
        if name.startswith(TRAINING_SET):
            continue
        paths = find_files(f"data.validation.{name}", patterns)
        for path, file in zip(paths, identities(paths), strict=True):
            if (file.size, file.digest) in trained_on:
                right = f"leave it out, or name the set for what it is, data.validation.{TRAINING_SET}_{name}"
                raise ConfigError(f"data.validation.{name}: {where} was trained on {path}; {right}")


def is_kept_out(saved: DataSection, saved_files: Files, asked: DataSection, files: Files) -> bool:
    """Whether all that is held out of shared files now was held out then.

    What is held out has a hash below the fraction: of the document, in whole files or in blocks of them, or of the name
    and the place of a block of a token file. A file that was changed has other documents, of mostly the same text.
    """
    if saved.source != asked.source or asked.validation_fraction > saved.validation_fraction:
        return False
    contents = {file["name"]: _content(file) for file in _data(saved_files)}
    if any(contents.get(file["name"], _content(file)) != _content(file) for file in _data(files)):
        return False
    if asked.source == "tokens":
        trained_on = set(contents.values())
        return all(file["name"] in contents for file in _data(files) if _content(file) in trained_on)
    then, now = (
        holds_whole_files_out(len(_data(each)), section.validation_fraction)
        for each, section in ((saved_files, saved), (files, asked))
    )
    return then == now


def _data(files: Files) -> list[dict[str, Any]]:
    return [file for file in files if file["name"] != TOKENIZER_FILE]


def _content(file: dict[str, Any]) -> tuple[int, str]:
    return file["size"], file["digest"]


def _content_of_tokenizer(files: Files) -> tuple[int, str] | None:
    return next((_content(file) for file in files if file["name"] == TOKENIZER_FILE), None)
