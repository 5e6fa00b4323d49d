"""Where a run begins: with the checkpoint it goes on from, with the parameters of another run, or with fresh ones."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from hybridnorm_jax.config import plugins
from hybridnorm_jax.config.resume_keys import differences, parameter_differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import from_yaml
from hybridnorm_jax.data import Data, train_iterator
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.anomalies import no_anomalies
from hybridnorm_jax.training.checkpoints import Checkpoints, find_checkpoint
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_identity import check_same_files, data_files
from hybridnorm_jax.training.state import TrainState


# A branch goes on with the moments of another run, at its place in the data: these must be the same.
SAME_IN_A_BRANCH = ("train.batch_size", "train.seq_len", "train.spike_window")


class Beginning(NamedTuple):
    """What a process begins with.

    Attributes:
      state: after `step` steps.
      iterator: whose next batch is that of step + 1.
      step: how many steps were made before; in a branch, those of the run that it comes from.
      files: the identities of the files of the data, as run_identity.data_files gives them.
    """

    state: TrainState
    iterator: Any
    step: int
    files: list[dict[str, Any]]


def beginning(config: RunConfig, program: Program, data: Data, checkpoints: Checkpoints, step: int | None) -> Beginning:
    """The checkpoint of `step`; without one what config.init_from names, or fresh parameters.

    Args:
      checkpoints: of the run.
      step: a complete step among them; None: the run is new.

    Raises:
      UserError: a checkpoint cannot be used for this model, or the data are not those that it was trained on.
    """
    iterator, files = _iterator(config, program, data), data_files(config.data)
    if step is None and config.init_from is not None:
        return _from_another_run(config, program, data, Beginning(program.fresh_state(), iterator, 0, files))
    if step is None:
        return Beginning(program.fresh_state(), iterator, 0, files)
    state, data_state = restore(program, checkpoints, step)
    _check_same_data(data, files, data_state, where=f"step {step}")
    iterator.set_state(data_state["iterator"])
    return Beginning(state, iterator, step, files)


def restore(program: Program, checkpoints: Checkpoints, step: int) -> tuple[TrainState, dict]:
    """(state, data state) of a step; where a version that skipped no steps saved it, none has been skipped."""
    abstract = program.abstract_state
    if "anomalies" in checkpoints.fields(step):
        return checkpoints.restore(abstract, step)
    state, data_state = checkpoints.restore(dataclasses.replace(abstract, anomalies=None), step)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.anomalies)
    fresh = jax.jit(no_anomalies, static_argnums=0, out_shardings=places)(program.config.train.spike_window)
    return dataclasses.replace(state, anomalies=fresh), data_state


def _iterator(config: RunConfig, program: Program, data: Data) -> Any:
    """The batches of the whole run, from the first on."""
    return train_iterator(
        data.train,
        batch_size=config.train.batch_size,
        accumulation=config.train.grad_accumulation,
        seed=_data_seed(config),
        share=program.share,
        read_threads=config.data.read_threads,
    )


def _data_seed(config: RunConfig) -> int:
    """Of the order of the data."""
    return config.train.seed if config.train.data_seed is None else config.train.data_seed


def _check_same_data(data: Data, files: Sequence[dict[str, Any]], data_state: dict[str, Any], *, where: str) -> None:
    """Raise ConfigError unless the data are the same files, with as many tokens, as when `where` was saved."""
    check_same_files(data_state.get("files"), files, where=where)
    now, before = data.train.num_tokens, data_state["train_tokens"]
    if now != before:
        right = "restore the data as it was, or start a new run with init_from"
        raise ConfigError(f"data: {now:,} tokens to train on, but {before:,} when {where} was saved; {right}")


def _from_another_run(config: RunConfig, program: Program, data: Data, fresh: Beginning) -> Beginning:
    """The parameters of the checkpoint that init_from names, of the newest where it names none; a branch has more."""
    directory, step = find_checkpoint(config.init_from)
    with Checkpoints(directory, keep=1) as checkpoints:
        if step is None:
            step = checkpoints.usable(allow_fallback=config.checkpoint.allow_fallback)
        saved = from_yaml(checkpoints.read_config(step), origin=f"init_from={config.init_from}")
        _say_of_plugins(config, checkpoints.read_plugins(step))
        if differing := parameter_differences(saved, config):
            right = "init_from takes parameters that mean the same; make these keys equal"
            raise ConfigError(f"init_from={config.init_from}: {'; '.join(differing)}: {right}")
        if config.init_optimizer:
            _check_branch(config, saved, step)
            return _branch(program, data, checkpoints, step, fresh)
        params = checkpoints.restore_params(program.abstract_state.params, step)
    return fresh._replace(state=dataclasses.replace(fresh.state, params=params))


def _check_branch(config: RunConfig, saved: RunConfig, step: int) -> None:
    """Raise ConfigError where the asked run cannot go on from `step` of the saved one."""
    if config.train.steps <= step:
        right = f"must be more than {step}, the steps that init_from={config.init_from} has made"
        raise ConfigError(f"train.steps={config.train.steps}: {right}")
    obstacles = [line for line in differences(saved, config) if line.startswith(("data.", *SAME_IN_A_BRANCH))]
    if _data_seed(saved) != _data_seed(config):
        obstacles.append(f"train.data_seed: saved {_data_seed(saved)}, asked {_data_seed(config)}")
    if (saved.optimizer.clip is None) != (config.optimizer.clip is None):
        obstacles.append(f"optimizer.clip: saved {saved.optimizer.clip}, asked {config.optimizer.clip}")
    if obstacles:
        right = "a branch goes on at its origin's place in the data; make these keys equal, or set init_optimizer=false"
        raise ConfigError(f"init_optimizer=true: {'; '.join(obstacles)}: {right}")


def _branch(program: Program, data: Data, checkpoints: Checkpoints, step: int, fresh: Beginning) -> Beginning:
    """A new run that goes on from a checkpoint of another one: with its moments, its step, and its place in the data."""
    state, data_state = restore(program, checkpoints, step)
    _check_same_data(data, fresh.files, data_state, where=f"step {step} of {checkpoints.directory}")
    fresh.iterator.set_state(data_state["iterator"])
    return fresh._replace(state=state, step=step)


def _say_of_plugins(config: RunConfig, saved: list[dict[str, Any]] | None) -> None:
    """Parameters of an edited plugin may be the start of another run; that they are is said."""
    missing = plugins.missing_plugin(saved or (), plugins.plugins_of(config.run.plugins))
    if missing is not None:
        name = missing["name"]
        say(f"init_from={config.init_from}: {name} was another file when these parameters were trained", file=sys.stderr)
