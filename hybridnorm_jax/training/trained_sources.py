"""What a checkpoint says of the sources of the run that saved it, and whether they are those of this start."""

import os
from collections.abc import Sequence
from typing import Any

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import Data
from hybridnorm_jax.data.dataset import source_key
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training.run_identity import check_same_files, data_files

# In the data state of a checkpoint: what each source of a mixture is.
SOURCES = "sources"
RIGHT = "restore the data as they were, or start a new run with init_from"


def files_of(section: DataSection, data: Data) -> list[dict[str, Any]]:
    """The identities of all files of a run, as run_identity.data_files gives them."""
    return data_files(section, {name: source.files for name, source in data.sources.items()})


def sources_as_json(section: DataSection, data: Data) -> list[dict[str, Any]]:
    """The sources of a mixture, as the data state of a checkpoint has them under SOURCES.

    The names of files are without that of the source, and the tokenizer is among the files of every source.
    """
    return [
        {
            "name": name,
            "source": section.sources[name].source,
            "validation_fraction": section.validation_fraction,
            "files": data_files(section, {"": source.files}),
            "is_split_by_hash": source.is_split_by_hash,
            "train_tokens": source.train.num_tokens,
            "selects": selection(section.sources[name]),
            "tokenizer": data.made_by,
        }
        for name, source in data.sources.items()
    ]


def selection(source: DataSection) -> str | None:
    """Which part of a record is its text, whose hash decides whether the record is held out; None: there is no text.

    Args:
      source: the data section of one source.
    """
    if source.source != "text":
        return None
    if source.records == "text":
        return f"data.text_field={source.text_field}"
    if source.records == "messages":
        return f"data.records=messages with data.chat_template={os.path.basename(source.chat_template)}"
    return f"data.records={source.records}"


def check_same_sources(saved: Sequence[dict[str, Any]], section: DataSection, data: Data, *, where: str) -> None:
    """Refuse a mixture of which a source that was saved is gone, or has other files or tokens than it had.

    Args:
      saved: as sources_as_json gives them.
      section, data: of this start.
      where: what they were saved in.

    Raises:
      ConfigError: names the source and the file.
    """
    now = {source["name"]: source for source in sources_as_json(section, data)}
    for before in saved:
        name = before["name"]
        if name not in now:
            raise ConfigError(f"data.mixture: has no source {name}, but had one when {where} was saved; {RIGHT}")
        check_same_files(before["files"], now[name]["files"], where=where, key=source_key(name), right=RIGHT)
        check_same_tokens(f"data.mixture.{name}", now[name]["train_tokens"], before["train_tokens"], where=where)


def check_same_tokens(key: str, now: int, before: int, *, where: str) -> None:
    """Refuse data with another number of tokens to train on than when `where` was saved.

    Raises:
      ConfigError: names `key`.
    """
    if now != before:
        right = "restore the data as it was, or start a new run with init_from"
        raise ConfigError(f"{key}: {now:,} tokens to train on, but {before:,} when {where} was saved; {right}")
