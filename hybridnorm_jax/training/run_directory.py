"""The directory of a run: made or found when training begins, read and written as a whole by others."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from hybridnorm_jax.config.resumption import differences
from hybridnorm_jax.config.run_config import RunConfig, RunSection
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.errors import ConfigError, MissingExtraError, UserError
from hybridnorm_jax.training.checkpoints import Checkpoints, find_checkpoint
from hybridnorm_jax.training.state import init_params

TOKENIZER = "tokenizer.json"


def open_run_directory(config: RunConfig) -> epath.Path:
    """The run's directory, made where it is new; one with checkpoints of another configuration is refused.

    Raises:
      ConfigError: names every key that differs and decides the trajectory.
    """
    directory = epath.Path(config.run.dir) / config.run.name
    file = directory / "config.yaml"
    try:
        saved = _saved_config(directory / "checkpoints", file)
    except ImportError as error:  # what etils needs for gs:// is not there
        raise MissingExtraError(f"run.dir={config.run.dir}", extra="tpu") from error
    if saved is not None and (differing := differences(saved, config)):
        raise ConfigError(f"{directory} holds another run ({'; '.join(differing)}): choose another run.name")
    if jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            partial = directory / "config.yaml.partial"
            partial.write_text(to_yaml(config))
            partial.replace(file)
        except OSError as error:
            raise UserError(f"{error.filename or file}: cannot be written: {error.strerror or error}") from error
    return directory


def _saved_config(checkpoints: epath.Path, file: epath.Path) -> RunConfig | None:
    """What a run with checkpoints was trained with: as its config.yaml says, or without one its newest checkpoint."""
    if not checkpoints.exists():
        return None
    if file.exists():
        return from_yaml(file.read_text(), origin=str(file))
    with Checkpoints(checkpoints, keep=1) as saved:
        newest = saved.latest()
        return None if newest is None else from_yaml(saved.read_config(newest), origin=str(checkpoints))


def load_run(path: str, *, allow_fallback: bool = False) -> tuple[RunConfig, Any, int]:
    """(configuration, parameters on the first device, step) of a run's newest checkpoint, or of the one named.

    `Decoder(config.model).apply({"params": params}, tokens)` gives its logits.

    Args:
      path: a run's directory, or one checkpoint's such as runs/quickstart/checkpoints/000500.
      allow_fallback: where a run's newest checkpoint is damaged, use the one before it, and say so. Never of one named.

    Raises:
      UserError: no complete checkpoint there, or a damaged one.
    """
    directory, step = find_checkpoint(path)
    with Checkpoints(directory, keep=1) as checkpoints:
        step = checkpoints.usable(allow_fallback=allow_fallback) if step is None else step
        config = from_yaml(checkpoints.read_config(step))
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
        return config, checkpoints.restore_params(abstract, step), step


def check_free(path: str) -> None:
    """Raise UserError unless a directory can be made at this path: nothing is there, or an empty directory."""
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{path}: exists already; choose a new directory, or remove it")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: cannot be made, {parent} is no directory that can be written to")


def save_run(path: str, config: RunConfig, params: Any, *, step: int = 0, tokenizer_file: Path | None = None) -> None:
    """Write parameters as a run: config.yaml, one checkpoint, and a copy of the tokenizer's file where one is given.

    `hybridnorm eval` scores it and `hybridnorm train` starts from it (init_from). Nothing is at `path` until all is.

    Args:
      path: a new directory, or an empty one.
      config: of the run; its `run` section is set to `path`, and an equivalent form or init_from is dropped.
      step: of the checkpoint.

    Raises:
      UserError: a directory cannot be made there.
    """
    check_free(path)
    target = Path(path).absolute()
    data = config.data
    if tokenizer_file is not None:
        data = dataclasses.replace(data, tokenizer=str(target / TOKENIZER))
    train = dataclasses.replace(config.train, equivalent_form="none", equivalent_pad_to=1, check_invariants=False)
    run = RunSection(name=target.name, dir=str(target.parent), plugins=config.run.plugins)
    text = to_yaml(dataclasses.replace(config, run=run, data=data, train=train, init_from=None))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        (partial / "config.yaml").write_text(text, encoding="utf-8")
        if tokenizer_file is not None:
            shutil.copy(tokenizer_file, partial / TOKENIZER)
        with Checkpoints(partial / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(step, {"params": params}, data_state={}, config_yaml=text, wait=True)
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
