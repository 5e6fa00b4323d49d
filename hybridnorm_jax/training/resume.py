"""Where a run begins: with the checkpoint it goes on from, with the parameters of another run, or with fresh ones."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from hybridnorm_jax.config.resume_keys import (
    differences_by_key,
    fixed_differences,
    is_place_of_data,
    parameter_differences,
    resume_differences,
)
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import from_yaml
from hybridnorm_jax.config_fields import present, spelled
from hybridnorm_jax.data import Data, train_iterator
from hybridnorm_jax.data.mixture import order_of
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.anomalies import no_anomalies
from hybridnorm_jax.training.huggingface_beginning import huggingface_params, is_huggingface
from hybridnorm_jax.training.layout import say_changed_layout
from hybridnorm_jax.training.local_checkpoints import Found
from hybridnorm_jax.training.parameter_average import begun_like
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_directory import saved_config
from hybridnorm_jax.training.run_identity import check_same_files
from hybridnorm_jax.training.saved_steps import AVERAGE, SavedSteps
from hybridnorm_jax.training.state import TrainState
from hybridnorm_jax.training.step_directories import find_checkpoint
from hybridnorm_jax.training.trained_before import (
    Trained,
    check_beginning,
    check_validation,
    trained_before,
    training_data,
)
from hybridnorm_jax.training.trained_sources import SOURCES, check_same_sources, check_same_tokens, files_of

# Of a branch these are the same as of the run that it leaves: they say which rows a step reads, or shape the state.
_SHAPES_OF_MOMENTS = ("optimizer.name", "optimizer.moment_dtype", "optimizer.muon_except")
SAME_IN_A_BRANCH = ("data.", "train.batch_size", "train.seq_len", "train.spike_window", *_SHAPES_OF_MOMENTS)


class Beginning(NamedTuple):
    """What a process begins with.

    Attributes:
      state: after `step` steps.
      iterator: whose next batch is that of step + 1.
      step: how many steps were made before.
      files: the identities of the files that are trained on, as run_identity.data_files gives them.
      before: what other runs trained the parameters on.
    """

    state: TrainState
    iterator: Any
    step: int
    files: list[dict[str, Any]]
    before: list[Trained]


def beginning(
    config: RunConfig,
    program: Program,
    data: Data,
    checkpoints: SavedSteps,
    step: int | None,
    *,
    local: Found | None = None,
) -> Beginning:
    """The checkpoint of `step`; without one what config.init_from names, or fresh parameters.

    Args:
      checkpoints: of the run.
      step: a complete step among them; None: the run is new, or has none yet.
      local: a newer step from the hosts' own disks, which is taken then.

    Raises:
      UserError: a checkpoint cannot be used for this model, or the data are not those that it was trained on.
    """
    if local is not None:
        _check_same_keys(local, config)
        say(f"note: goes on after step {local.step}, from the hosts' own disks (checkpoint.local_dir)", file=sys.stderr)
        where = f"step {local.step}"
        return _continued(config, program, data, local.state, local.facts["data_state"], step=local.step, where=where)
    if step is not None:
        return _go_on(config, program, data, checkpoints, step, where=f"step {step}")
    now, before = training_data(config.data, data), []
    files = files_of(config.data, data)
    if config.init_from is not None and is_huggingface(config.init_from):
        state = program.state_with(huggingface_params(config, program))
    elif config.init_from is not None:
        source = _source(config)
        if config.init_optimizer:
            _check_branch(source, config)
            where = f"step {source.step} of {config.init_from}"
            return _go_on(config, program, data, source.checkpoints, source.step, where=where)
        data_state = source.checkpoints.read_data_state(source.step)
        where = f"init_from={config.init_from}"
        before = check_beginning(data_state, source.config.data, config.data, now, where=where)
        params = source.checkpoints.restore_params(program.abstract_state.params, source.step, plain=config.init_plain)
        state = program.state_with(params)
    else:
        state = program.fresh_state()
    return Beginning(state, training_batches(config, program, data), step=0, files=files, before=before)


def _go_on(
    config: RunConfig, program: Program, data: Data, checkpoints: SavedSteps, step: int, *, where: str
) -> Beginning:
    """After a step of this run or of another one: with its moments, and at its place in the same data.

    Args:
      where: what was saved, for messages.
    """
    state, data_state = restore(program, checkpoints, step)
    if "files" not in data_state:
        _check_same_places(config, saved_config(checkpoints, step), where=where)
    return _continued(config, program, data, state, data_state, step=step, where=where)


def _continued(
    config: RunConfig,
    program: Program,
    data: Data,
    state: TrainState,
    data_state: Mapping[str, Any],
    *,
    step: int,
    where: str,
) -> Beginning:
    """As _go_on, with what was restored."""
    say_changed_layout(data_state, program)
    now, files = training_data(config.data, data), files_of(config.data, data)
    _check_same_data(config, data, data_state, files, where=where)
    before = trained_before(data_state)
    check_validation(before, config.data, now, where=f"init_from={config.init_from}")
    iterator = training_batches(config, program, data)
    iterator.set_state(data_state["iterator"])
    return Beginning(state, iterator, step, files, before)


def restore(program: Program, checkpoints: SavedSteps, step: int) -> tuple[TrainState, dict]:
    """(state, data state) of a step; where a version that skipped no steps saved it, none has been skipped.

    Where the program averages the parameters and the checkpoint has no average, as that of a run that is branched from
    may, the average begins with its parameters. One that the program has no use for is left where it is.
    """
    abstract, fields = program.abstract_state, checkpoints.fields(step)
    absent = {name: None for name in ("anomalies", AVERAGE) if name not in fields}
    left_out = AVERAGE if abstract.average is None else None
    state, data_state = checkpoints.restore(dataclasses.replace(abstract, **absent), step, without=left_out)
    if "anomalies" in absent:
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract.anomalies)
        fresh = jax.jit(no_anomalies, static_argnums=0, out_shardings=places)(program.config.train.spike_window)
        state = dataclasses.replace(state, anomalies=fresh)
    if AVERAGE in absent and abstract.average is not None:
        state = dataclasses.replace(state, average=begun_like(abstract.average, state.params))
    return state, data_state


def training_batches(config: RunConfig, program: Program, data: Data) -> Any:
    """The batches of the whole run, from the first on."""
    return train_iterator(
        order_of(config, data),
        batch_size=config.train.batch_size,
        accumulation=program.microbatches.count,
        share=program.share,
        read_threads=config.data.read_threads,
    )


def _check_same_data(
    config: RunConfig, data: Data, saved: Mapping[str, Any], files: list[dict[str, Any]], *, where: str
) -> None:
    """Raise ConfigError unless the files, and the tokens in them that are trained on, are those that were saved.

    A mixture may have new sources: the stages before the saved step have not read them (resume_keys).
    """
    if SOURCES in saved:
        check_same_sources(saved[SOURCES], config.data, data, where=where)
        return
    check_same_files(saved.get("files"), files, where=where)
    check_same_tokens("data", data.train_tokens, saved["train_tokens"], where=where)


def _check_same_keys(local: Found, config: RunConfig) -> None:
    """Raise ConfigError where a local checkpoint was saved by a run with other keys that decide what is trained."""
    saved = from_yaml(local.facts["config_yaml"], origin="checkpoint.local_dir")
    if differing := resume_differences(saved, config, local.step):
        raise ConfigError(f"checkpoint.local_dir holds another run ({'; '.join(differing)}): choose another run.name")


def _check_same_places(config: RunConfig, saved: RunConfig, *, where: str) -> None:
    """Raise ConfigError where data that nothing else identifies are not at their old places."""
    for key, line in differences_by_key(saved, config).items():
        if is_place_of_data(key):
            wrong = f"{line}, and {where} holds no digests of data that would say whether they are the same"
            raise ConfigError(f"{wrong}; name the data as they were")


class _Source(NamedTuple):
    """The checkpoint that init_from names, and the configuration that it was trained with."""

    checkpoints: SavedSteps
    step: int
    config: RunConfig


def _source(config: RunConfig) -> _Source:
    """What config.init_from names, where its parameters mean the same in the model of this run.

    Raises:
      ConfigError: names the first key of the model that is another.
    """
    directory, step = find_checkpoint(present(config.init_from))
    checkpoints = SavedSteps(directory)
    if step is None:
        step = checkpoints.needed(allow_fallback=config.checkpoint.allow_fallback)
    saved = saved_config(checkpoints, step)
    if differing := parameter_differences(saved, config):
        wrong = f"its parameters belong to another model ({differing[0]})"
        raise ConfigError(f"init_from={config.init_from}: {wrong}; ask for the model that it was trained as")
    return _Source(checkpoints, step, saved)


def _check_branch(source: _Source, config: RunConfig) -> None:
    """Raise ConfigError where a run cannot go on from another one's moments and place in the data.

    Learning rate, schedule and number of steps may be others: that is what a branch is for.
    """
    saved, step = source.config, source.step
    if step >= config.train.steps:
        wrong = f"{config.init_from} has made {step} steps already"
        raise ConfigError(f"train.steps={config.train.steps}: {wrong}; ask for more with init_optimizer=true")
    differing = fixed_differences(saved, config, step)
    fixed = [line for key, line in differing.items() if key.startswith(SAME_IN_A_BRANCH)]
    before, now = saved.train, config.train
    if before.order_seed != now.order_seed:
        fixed.append(f"train.data_seed: saved {before.order_seed}, asked {now.order_seed}")
    if before.shuffle_rounds != now.shuffle_rounds:
        fixed.append(f"train.shuffle_rounds: saved {before.shuffle_rounds}, asked {now.shuffle_rounds}")
    if (saved.optimizer.clip is None) != (config.optimizer.clip is None):
        fixed.append(f"optimizer.clip: saved {spelled(saved.optimizer.clip)}, asked {spelled(config.optimizer.clip)}")
    if fixed:
        right = "leave it as it was, or start without init_optimizer"
        raise ConfigError(f"init_optimizer=true: a branch of {config.init_from} needs the same {fixed[0]}; {right}")
