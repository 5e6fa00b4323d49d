"""The checkpoint of a run that is to be scored: found, checked, and read where the scores are computed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from hybridnorm_jax.commands.which_parameters import WhichParameters
from hybridnorm_jax.config.resume_keys import differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import from_yaml, named_plugins
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_directory import saved_config
from hybridnorm_jax.training.saved_steps import SavedSteps
from hybridnorm_jax.training.step_directories import find_checkpoint
from hybridnorm_jax.training.trained_before import trained_on

# Where a run trained says nothing of where it is evaluated: by default on all devices there are.
ANYWHERE = (
    "mesh.data=1",
    "mesh.fsdp=-1",
    "mesh.tensor=1",
    "mesh.expert=1",
    "mesh.context=1",
    "mesh.replica=1",
    "model.attention=auto",
    "model.expert_dispatch=auto",
    "train.watch_every=null",
)
# Model keys that may be another in evaluation than in training: the function stays the same up to rounding.
SAME_FUNCTION = (
    *("model.dtype", "model.dropout", "model.initializer", "model.init_std"),
    *("model.norm_alpha", "model.norm_shift"),
)


@dataclasses.dataclass(frozen=True)
class ScoredRun:
    """A checkpoint of a run, whose parameters are not read yet.

    Attributes:
      directory, step: of the checkpoints, and which one it is.
      saved: the configuration with which it was saved; `config` is that of this evaluation.
      data_state: what it says of its data.
      program: of `config`, on these devices.
      checkpoints: where the parameters are read from.
      plain: score parameters that are not averaged, even where there are averaged ones.
    """

    directory: epath.Path
    step: int
    saved: RunConfig
    config: RunConfig
    data_state: Mapping[str, Any]
    program: Program
    checkpoints: SavedSteps
    plain: bool

    @property
    def name(self) -> str:
        """The directory of the checkpoint."""
        return str(self.directory / f"{self.step:06d}")

    @property
    def where(self) -> str:
        """The directory of the run, for messages."""
        return str(self.directory.parent)

    def which(self) -> WhichParameters:
        """Which parameters `params` gives."""
        return WhichParameters(has_average=self.checkpoints.has_average(self.step), plain=self.plain)

    def params(self) -> Any:
        """The parameters, on the program's mesh."""
        return self.checkpoints.restore_params(self.program.abstract_state.params, self.step, plain=self.plain)


def open_run(path: str, overrides: Sequence[str], *, plain: bool) -> ScoredRun:
    """A run's newest checkpoint, or the one that `path` names; arguments as those of commands.eval.evaluate_run.

    Raises:
      UserError: no checkpoint there, or an override that makes another model of it.
    """
    directory, step = find_checkpoint(path)
    checkpoints = SavedSteps(directory)
    if step is None:
        step = checkpoints.needed(allow_fallback=_allows_fallback(overrides))
    text = checkpoints.read_config(step)
    saved = saved_config(checkpoints, step, import_these=named_plugins(overrides))
    config = from_yaml(text, [*ANYWHERE, *overrides])
    data_state = checkpoints.read_data_state(step)
    known = trained_on(data_state, saved.data)
    own = ("model.",) if known else ("model.", "data.tokenizer")
    for line in differences(saved, config):
        if line.startswith(own) and not line.startswith(SAME_FUNCTION):
            raise ConfigError(f"{line}: {directory.parent} holds that model and no other")
    config = config.at_step(step)
    return ScoredRun(directory, step, saved, config, data_state, Program(config), checkpoints, plain)


def _allows_fallback(overrides: Sequence[str]) -> bool:
    """What is asked here; whether the run itself was allowed to is its own affair."""
    asked = [override for override in overrides if override.startswith("checkpoint.")]
    return from_yaml("{}", asked).checkpoint.allow_fallback
