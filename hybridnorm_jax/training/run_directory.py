"""The directory of a run: made or found when training begins, read and written as a whole by others."""

import dataclasses
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from hybridnorm_jax.config.plugins import import_plugins, imported, plugins_of, to_json
from hybridnorm_jax.config.run_config import RunConfig, RunSection
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.errors import MissingExtraError, UserError
from hybridnorm_jax.mesh.sharding_rules import MESH_AXES, resolve_rules
from hybridnorm_jax.mesh.shardings import tree_shardings
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.leaf_kinds import first_difference
from hybridnorm_jax.training.run_identity import check_same_plugins, check_same_run, keep_sources
from hybridnorm_jax.training.saved_steps import SavedSteps
from hybridnorm_jax.training.step_directories import absolute, check_place, find_checkpoint
from hybridnorm_jax.training.trained_before import TRAINED_BEFORE, Trained, as_json
from hybridnorm_jax.whole_files import expanded, is_local, write_whole

TOKENIZER = "tokenizer.json"


def run_directory(config: RunConfig) -> epath.Path:
    """Where the run's files go.

    Raises:
      CheckpointError: no checkpoints can be there (step_directories.check_place).
      MissingExtraError: it is a bucket and cannot be reached.
    """
    directory = epath.Path(expanded(config.run.dir)) / config.run.name
    check_place(absolute(directory))
    try:
        directory.exists()
    except ImportError as error:  # what etils needs for gs:// is not there
        raise MissingExtraError(f"run.dir={config.run.dir}", extra="tpu") from error
    return directory


def open_run_directory(config: RunConfig) -> tuple[epath.Path, RunConfig]:
    """(the run's directory, which may not be there yet, the configuration as run_identity.check_same_run returns it).

    A directory with checkpoints or metrics of another run is refused. Nothing is written.

    Raises:
      ConfigError: see run_identity.check_same_run.
    """
    directory = run_directory(config)
    try:
        return directory, check_same_run(directory, config)
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read: {error.strerror or error}") from error


def write_config(directory: epath.Path, config: RunConfig) -> None:
    """Write the run's config.yaml, by process 0; for when nothing can refuse the run any more."""
    if jax.process_index() != 0:
        return
    file = directory / "config.yaml"
    try:
        write_whole(file, to_yaml(config))
    except OSError as error:
        raise UserError(f"{error.filename or file}: cannot be written: {error.strerror or error}") from error


def load_run(
    path: str,
    *,
    mesh: Mesh | None = None,
    shardings: Any = None,
    allow_fallback: bool = False,
    plain: bool = False,
    plugins: Sequence[str] = (),
) -> tuple[RunConfig, Any]:
    """(configuration, parameters) of a run's newest checkpoint, or of the one named, saved from any devices.

        config, params = hn.load_run("runs/quickstart")
        logits = hn.Decoder(config.model).apply({"params": params}, tokens)

    `config` is the RunConfig of the run, and `config.model` the ModelConfig of its model; where branches of the scheme
    grow with the training step, as they are at the checkpoint's (model.ramp_at). The optimizer's state is not
    read, but every file of the checkpoint is compared with its digest.

    Args:
      path: a run directory, or one checkpoint's such as runs/quickstart/checkpoints/000500; may be on gs://.
      mesh: the parameters lie on it as the run's mesh.rules say. Its axes are those of hn.make_mesh.
      shardings: instead of a mesh, one jax.sharding.Sharding for all parameters, or a tree of them like the parameters.
        Without either, the parameters lie on this process's first device.
      plain: where the run averages its parameters (optimizer.ema_decay), read those of the last step, which are not
        averaged.
      allow_fallback: where a run's newest checkpoint is damaged, use the one before it, and say so. Never of one named.
      plugins: Python files or modules to import first, as run.plugins. A run that was trained with plugins needs them;
        those that its own configuration names are never imported, because the run may be a stranger's.

    Raises:
      UserError: no complete checkpoint there, or a damaged one; a mesh with other axes, or with shardings besides; a
        plugin is missing, or is another file than the run was trained with.
    """
    directory, step = find_checkpoint(path)
    checkpoints = SavedSteps(directory)
    step = checkpoints.needed(allow_fallback=allow_fallback) if step is None else step
    return load_step(checkpoints, step, mesh=mesh, shardings=shardings, plain=plain, plugins=plugins)


def load_step(
    checkpoints: SavedSteps,
    step: int,
    *,
    mesh: Mesh | None = None,
    shardings: Any = None,
    plain: bool = False,
    plugins: Sequence[str] = (),
) -> tuple[RunConfig, Any]:
    """As load_run, of a step that the caller has chosen: whoever reads more of it has its files verified once."""
    config = saved_config(checkpoints, step, import_these=plugins).at_step(step)
    shapes = abstract_params(config.model)
    places = _places(shapes, config, mesh, shardings)
    return config, checkpoints.restore_params(jax.tree.map(_abstract, shapes, places), step, plain=plain)


def saved_config(checkpoints: SavedSteps, step: int | None, *, import_these: Sequence[str] = ()) -> RunConfig:
    """The configuration of a step (None: the newest), if this process was started with the run's plugins.

    Args:
      import_these: plugins that the caller names, which are imported first.

    Raises:
      ConfigError: a plugin is missing, or is another file than the run was trained with.
    """
    import_plugins(import_these)
    directory = checkpoints.directory
    config = from_yaml(checkpoints.read_config(step), origin=str(directory))
    if config.run.plugins:
        check_same_plugins(
            checkpoints.read_plugins(step),
            imported(),
            where=f"{directory}, step {step}",
            kept=directory.parent,
            more_allowed=True,
        )
    return config


def newest_step(path: str) -> tuple[SavedSteps, int]:
    """The steps of a run, and that of them which `load_run` reads for this path.

    Raises:
      UserError: no complete checkpoint there.
    """
    directory, step = find_checkpoint(path)
    checkpoints = SavedSteps(directory)
    if step is None:
        step = checkpoints.latest()
    if step is None:
        raise UserError(f"{path}: no complete checkpoint there")
    return checkpoints, step


def _places(shapes: Any, config: RunConfig, mesh: Mesh | None, shardings: Any) -> Any:
    """The sharding of every parameter."""
    if mesh is not None and shardings is not None:
        raise UserError("mesh, shardings: give one of the two")
    if mesh is not None:
        if missing := [axis for axis in MESH_AXES if axis not in mesh.axis_names]:
            raise UserError(f"mesh: lacks the axes {', '.join(missing)}; hn.make_mesh makes one with all of them")
        return tree_shardings(shapes, mesh, resolve_rules(config.mesh.rules))
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda _: shardings, shapes)
    return shardings


def _abstract(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def check_free(path: str) -> None:
    """Raise UserError unless a run can be made at this path: nothing is there, or an empty directory."""
    check_place(absolute(path))
    if not is_local(path):
        if _exists_remotely(path):
            raise UserError(f"{path}: exists already; choose a new directory, or remove it")
        return
    target = Path(path).absolute()
    if target.is_symlink():
        raise UserError(f"{path}: is a symbolic link; name the directory that is meant, and that is not there yet")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{path}: exists already; choose a new directory, or remove it")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: cannot be made, {parent} is no directory that can be written to")


def _exists_remotely(path: str) -> bool:
    try:
        directory = epath.Path(path)
        return directory.exists() and any(directory.iterdir())
    except ImportError as error:
        raise MissingExtraError(path, "tpu") from error


def save_run(
    path: str,
    config: RunConfig,
    params: Any,
    *,
    step: int = 0,
    tokenizer_file: Path | None = None,
    trained_on: Sequence[Trained] = (),
) -> None:
    """Write parameters as a run: config.yaml, one checkpoint, and a copy of the tokenizer's file where one is given.

        hn.save_run("runs/mine", hn.RunConfig(model=model_config), params)

    `hybridnorm eval` scores it, `hybridnorm train` starts from it (init_from), and `load_run` reads it. Nothing is at
    `path` until all is; on gs://, where a directory cannot be renamed, nothing complete is.

    Args:
      path: a new directory, or an empty one; may be on gs://.
      config: of the run; its `run` section is set to `path`, and an equivalent form or init_from is dropped.
      params: the tree of Decoder(config.model), see docs/parameters.md.
      step: of the checkpoint.
      trained_on: what the parameters were trained on, where a checkpoint has said so; none of it is validation of a run
        that starts from this one.

    Raises:
      UserError: a directory cannot be made there; the parameters are not those of the model, or the step is negative.
    """
    if not isinstance(config, RunConfig):
        raise UserError(f"config: is a {type(config).__name__}; give hn.RunConfig(model=...)")
    path = expanded(path)  # as load_run does
    check_free(path)
    _check_params(params, config.model)
    if step < 0:
        raise UserError(f"step={step}: must not be negative")
    target = epath.Path(Path(path).absolute()) if is_local(path) else epath.Path(path)
    data = config.data
    if tokenizer_file is not None:
        data = dataclasses.replace(data, tokenizer=str(target / TOKENIZER))
    train = dataclasses.replace(config.train, equivalent_form="none", equivalent_pad_to=1, check_invariants=False)
    run = RunSection(name=target.name, dir=str(target.parent), plugins=config.run.plugins)
    written = dataclasses.replace(config, run=run, data=data, train=train, init_from=None, init_optimizer=False)
    if not is_local(path):
        _write_run(target, written, params, step, tokenizer_file, trained_on)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not mkdtemp, whose directories are for their owner alone, whatever the umask says.
    partial = Path(target.parent) / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        _write_run(epath.Path(partial), written, params, step, tokenizer_file, trained_on)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_params(params: Any, model: ModelConfig) -> None:
    """Raise UserError unless these are the parameters of Decoder(model), which `load_run` will look for."""
    difference = first_difference(params, abstract_params(model))
    if difference is not None:
        path, found, needed = difference
        right = "give the tree of Decoder(config.model), as docs/parameters.md lists it"
        raise UserError(f"params: {path} is {found}, but the model has {needed}; {right}")


def _write_run(
    directory: epath.Path,
    config: RunConfig,
    params: Any,
    step: int,
    tokenizer_file: Path | None,
    trained_on: Sequence[Trained],
) -> None:
    config_yaml, used = to_yaml(config), plugins_of(config.run.plugins)
    data_state = {TRAINED_BEFORE: as_json(trained_on)} if trained_on else {}
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer_file is not None:
        (directory / TOKENIZER).write_bytes(Path(tokenizer_file).read_bytes())
    with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(
            step, {"params": params}, data_state=data_state, config_yaml=config_yaml, plugins=to_json(used), wait=True
        )
    keep_sources(directory, used)
    (directory / "config.yaml").write_text(config_yaml)
