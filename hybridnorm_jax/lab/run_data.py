"""What the runs of a comparison were trained and scored on: results on other data cannot be compared."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import open_data
from hybridnorm_jax.data.files.identity import identities
from hybridnorm_jax.data.files.patterns import find_files, pattern_root
from hybridnorm_jax.training.run_identity import check_same_files
from hybridnorm_jax.training.trained_sources import files_of

TRAINED_ON = "data.files"


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
      train_tokens: how many tokens are trained on.
      files: the identities of files as JSON has them, by the key that names them: data.files, data.validation.NAME.
    """

    train_tokens: int
    files: dict[str, list[dict[str, Any]]]


def read_data(config: RunConfig) -> RunData:
    """The data as they are now.

    Raises:
      DataError: they cannot be read.
    """
    section = config.data
    data = open_data(section, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size, progress=False)
    files = {TRAINED_ON: files_of(section, data)}
    for name, patterns in section.validation.items():
        key = f"data.validation.{name}"
        found = identities(find_files(key, patterns), pattern_root(patterns))
        files[key] = [dataclasses.asdict(file) for file in found]
    return RunData(data.train_tokens, files)


def check_same_data(result: Mapping[str, Any], now: RunData, *, file: epath.Path) -> None:
    """Refuse the result of a run on other data.

    Args:
      result: the content of `file`.

    Raises:
      ConfigError: names the first data file that is another, and how.
    """
    saved = result.get("data", {})
    right = "restore the data as they were, or choose another run.name"
    for key, files in now.files.items():
        check_same_files(saved.get(key), files, where=str(file), key=key, right=right)
