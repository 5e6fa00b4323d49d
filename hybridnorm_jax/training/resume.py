"""Where a run begins: with the checkpoint it goes on from, with the parameters of another run, or with fresh ones."""

import dataclasses
from typing import Any, NamedTuple

import jax

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import Data, train_iterator
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training.anomalies import no_anomalies
from hybridnorm_jax.training.checkpoints import Checkpoints, find_checkpoint
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.state import TrainState


class Beginning(NamedTuple):
    """What a process begins with.

    Attributes:
      state: after `step` steps.
      iterator: whose next batch is that of step + 1.
      step: how many steps were made before.
    """

    state: TrainState
    iterator: Any
    step: int


def beginning(config: RunConfig, program: Program, data: Data, checkpoints: Checkpoints, step: int | None) -> Beginning:
    """The checkpoint of `step`; without one the parameters that config.init_from names, or fresh ones.

    Args:
      checkpoints: of the run.
      step: a complete step among them; None: the run is new.

    Raises:
      UserError: a checkpoint cannot be used for this model, or the data are not those that it was trained on.
    """
    iterator = _iterator(config, program, data)
    if step is not None:
        state, data_state = restore(program, checkpoints, step)
        _check_same_data(data, data_state["train_tokens"], step)
        iterator.set_state(data_state["iterator"])
        return Beginning(state, iterator, step)
    if config.init_from is None:
        return Beginning(program.fresh_state(), iterator, step=0)
    params = _params_of(config.init_from, config, program)
    return Beginning(dataclasses.replace(program.fresh_state(), params=params), iterator, step=0)


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
        seed=config.train.seed if config.train.data_seed is None else config.train.data_seed,
        share=program.share,
        read_threads=config.data.read_threads,
    )


def _check_same_data(data: Data, tokens_before: int, step: int) -> None:
    """Raise ConfigError unless there are as many tokens to train on as when `step` was saved."""
    now = data.train.num_tokens
    if now != tokens_before:
        right = "restore the data as it was, or start a new run with init_from"
        raise ConfigError(
            f"data: {now:,} tokens to train on, but {tokens_before:,} when step {step} was saved; {right}"
        )


def _params_of(path: str, config: RunConfig, program: Program) -> Any:
    """The parameters of another run, of the step that its path names or of its newest."""
    directory, step = find_checkpoint(path)
    with Checkpoints(directory, keep=1) as checkpoints:
        if step is None:
            step = checkpoints.usable(allow_fallback=config.checkpoint.allow_fallback)
        return checkpoints.restore_params(program.abstract_state.params, step)
