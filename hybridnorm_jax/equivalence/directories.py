"""Directories in and out of the conversion: Hugging Face checkpoints and runs of ours."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.config import ModelConfig, UserError
from hybridnorm_jax.config_files import to_yaml
from hybridnorm_jax.interop.huggingface import load_huggingface
from hybridnorm_jax.run_config import DataSection, RunConfig, RunSection, TrainSection
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.restore import load_run

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model read from a directory.

    Attributes:
      kind: what the directory is, in words.
      config: how to train or evaluate it; config.model is the model's.
      params: its parameters.
      step: the step of the checkpoint, 0 where there is none.
      tokenizer_file: the tokenizer.json that came with it, None where there is none.
    """

    kind: str
    config: RunConfig
    params: Any
    step: int
    tokenizer_file: Path | None = None


def read_directory(path: str, ignore_keys: Sequence[str] = ()) -> Source:
    """A Hugging Face directory (it has a config.json), a run's directory, or one checkpoint of a run.

    Args:
      ignore_keys: of config.json, see load_huggingface.

    Raises:
      UserError: none of them, or damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{path}: {'not a directory' if directory.exists() else 'no such directory'}")
    if (directory / "config.json").is_file():
        return _read_huggingface(directory, ignore_keys)
    if any(directory.glob("*.safetensors")) or not any(directory.iterdir()):
        raise UserError(f"{path}: holds neither a config.json (Hugging Face) nor checkpoints (a run)")
    config, params, step = load_run(path)
    return Source(f"run, step {step}", config, params, step)


def _read_huggingface(path: Path, ignore_keys: Sequence[str]) -> Source:
    model, params = load_huggingface(path, ignore_keys=ignore_keys)
    file = path / TOKENIZER if (path / TOKENIZER).is_file() else None
    wide = dataclasses.replace(model, param_dtype="float32")
    seq_len = min(TrainSection.seq_len, model.max_positions or TrainSection.seq_len)
    data = DataSection() if file is None else DataSection(tokenizer=str(file))
    config = RunConfig(model=wide, data=data, train=TrainSection(seq_len=seq_len))
    return Source("Hugging Face", config, params, 0, file)


def check_free(path: str) -> None:
    """Raise UserError unless a directory can be made at this path: nothing is there, or an empty directory."""
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{path}: exists already; choose a new directory, or remove it")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: cannot be made, {parent} is no directory that can be written to")


def write_run(path: str, source: Source, model: ModelConfig, params: Any) -> None:
    """Write `params` as a run of ours: config.yaml, one checkpoint, and the tokenizer where there was one.

    eval.py scores it and train.py starts from it (init_from). Nothing is at `path` until all of it is.
    """
    target = Path(path).absolute()
    data = source.config.data
    if source.tokenizer_file is not None:
        data = dataclasses.replace(data, tokenizer=str(target / TOKENIZER))
    train = dataclasses.replace(
        source.config.train, equivalent_form="none", equivalent_pad_to=1, check_invariants=False
    )
    run = RunSection(name=target.name, dir=str(target.parent), plugins=source.config.run.plugins)
    text = to_yaml(dataclasses.replace(source.config, run=run, model=model, data=data, train=train, init_from=None))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        (partial / "config.yaml").write_text(text, encoding="utf-8")
        if source.tokenizer_file is not None:
            shutil.copy(source.tokenizer_file, partial / TOKENIZER)
        with Checkpoints(partial / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(source.step, {"params": params}, data_state={}, config_yaml=text, wait=True)
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
