"""A model in a directory: a run's or a Hugging Face one's, with what is needed to train or use it."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.commands.which_parameters import WhichParameters
from hybridnorm_jax.config.data_section import UNKNOWN_TOKENIZER, DataSection
from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.checkpoint_files import PICKLE, PICKLES, find_file, foreign_weights

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
HUGGING_FACE = "Hugging Face"


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model read from a directory.

    Attributes:
      path: of the directory.
      kind: what the directory is, in words.
      config: how to train or evaluate it; config.model is the model's.
      params: its parameters.
      step: the step of the checkpoint, 0 where there is none.
      tokenizer_file: the tokenizer.json that came with it, None where there is none.
      trained_on: what it was trained on, as far as a run says so.
    """

    path: str
    kind: str
    config: RunConfig
    params: Any
    step: int
    tokenizer_file: Path | None = None
    trained_on: Sequence[Any] = ()


def read_directory(
    path: str, ignore_keys: Sequence[str] = (), *, dtype: str | None = None, plain: bool = False
) -> SavedModel:
    """A Hugging Face directory (it has a config.json), a run's directory, or one checkpoint of a run, also as RUN@STEP.

    Args:
      ignore_keys: of config.json, see load_huggingface.
      dtype: of a Hugging Face directory's parameters, see load_huggingface. Those of a run are as they were saved.
      plain: of a run that averages its parameters, those of the last step.

    Raises:
      UserError: none of them, or damaged.
    """
    directory = Path(path)
    if not directory.exists():
        directory = Path(path.rpartition("@")[0] or path)  # of RUN@STEP
    if not directory.is_dir():
        if Path(path).suffix in PICKLES and Path(path).exists():
            raise UserError(f"{path}: {PICKLE}")
        wrong = "not a directory; name the directory that holds it" if Path(path).exists() else "no such directory"
        raise UserError(f"{path}: {wrong}")
    if os.path.lexists(directory / CONFIG):
        if directory != Path(path):
            raise UserError(f"{path}: {directory} is a Hugging Face directory, which has no steps; name it alone")
        return _read_huggingface(directory, ignore_keys, dtype)
    if any(directory.glob("*.safetensors")) or not any(directory.iterdir()):
        raise UserError(f"{path}: holds neither a config.json (Hugging Face) nor checkpoints (a run)")
    if weights := foreign_weights(directory):
        raise UserError(weights)
    from hybridnorm_jax.training.run_directory import load_step, newest_step
    from hybridnorm_jax.training.trained_before import trained_on

    checkpoints, step = newest_step(path)
    config, params = load_step(checkpoints, step, plain=plain)
    known = trained_on(checkpoints.read_data_state(step), config.data)
    which = WhichParameters(checkpoints.has_average(step), plain)
    return SavedModel(path, f"run, step {step}{which.said}", config, params, step, trained_on=known)


def _read_huggingface(path: Path, ignore_keys: Sequence[str], dtype: str | None) -> SavedModel:
    from hybridnorm_jax.interop.huggingface import load_huggingface

    # Its errors come before those of the weights, which take longer to read.
    file = find_file(path, TOKENIZER) if os.path.lexists(path / TOKENIZER) else None
    model, params = load_huggingface(path, dtype=dtype, ignore_keys=ignore_keys)
    wide = dataclasses.replace(model, param_dtype="float32")
    seq_len = min(TrainSection.seq_len, model.max_positions or TrainSection.seq_len)
    data = DataSection(tokenizer=UNKNOWN_TOKENIZER if file is None else str(file))
    config = RunConfig(model=wide, data=data, train=TrainSection(seq_len=seq_len))
    return SavedModel(str(path), HUGGING_FACE, config, params, 0, file)
