"""How the runs of a comparison ended: what result.json says, and when one that is there counts."""

import dataclasses
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.perplexity import Score
from hybridnorm_jax.lab.divergence import rising_since
from hybridnorm_jax.lab.groups import RunGroup, compared_set
from hybridnorm_jax.lab.labels import measured_otherwise
from hybridnorm_jax.lab.run_data import RunData, check_same_data
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED, compile_seconds, read_losses, read_result
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.hooks.skipped_steps import DivergedError
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.run_identity import check_same_run, saved_run

# How training ended: with the scores of the validation sets, or by diverging.
Outcome = dict[str, Score] | DivergedError


class Ended(NamedTuple):
    """A run that ended: its configuration, and the content of its result.json."""

    config: RunConfig
    result: dict[str, Any]

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.config.optimizer.learning_rate


@dataclasses.dataclass(frozen=True)
class End:
    """How a training run ended.

    Attributes:
      step: how many steps it made.
      diverged_at: the step at which it diverged; None: it finished.
      scores: validation set -> its Score as JSON has it.
    """

    step: int
    diverged_at: int | None
    scores: dict[str, dict[str, Any]]


def end_of(config: RunConfig, directory: epath.Path, outcome: Outcome) -> End:
    """How a run ended; says so where it diverged."""
    if isinstance(outcome, DivergedError):
        say(f"{config.run.name} diverged: {outcome}")
        return End(step=outcome.step, diverged_at=outcome.step, scores={})
    scores = {name: score.as_json() for name, score in outcome.items()}
    last = config.train.steps
    diverged_at = rising_since(read_losses(directory))
    if diverged_at is not None:
        say(f"{config.run.name} diverged: the loss was lowest at step {diverged_at}")
    elif any(score["loss"] is None for score in scores.values()):
        say(f"{config.run.name} diverged: the final loss is not finite")
        diverged_at = last
    return End(step=last, diverged_at=diverged_at, scores=scores)


def result_of(
    config: RunConfig, directory: epath.Path, outcome: Outcome, data: RunData, *, seconds: float, together: int
) -> dict[str, Any]:
    """What result.json says of how a run ended, on what data and where.

    Args:
      seconds: of all runs that were trained at once; each of them counts as an equal part of it.
      together: how many these were.
    """
    end = end_of(config, directory, outcome)
    compiling = compile_seconds(read_records(directory))
    return {
        "status": FINISHED if end.diverged_at is None else DIVERGED,
        "step": end.step,
        "diverged_at": end.diverged_at,
        "scores": end.scores,
        "train_tokens": data.train_tokens,
        "data": data.files,
        "tokens": end.step * config.tokens_per_step,
        "seconds": round(seconds / together, 1),
        "compile_seconds": None if compiling is None else round(compiling / together, 1),
        "together": together,
        "hardware": hardware(),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }


def outcome_text(result: dict[str, Any]) -> str:
    """The loss of a run on its first validation set, or how else it ended."""
    if result["status"] == DIVERGED:
        return f"diverged {result['diverged_at']}"
    losses = [score["loss"] for score in result["scores"].values()]
    return f"{losses[0]:.4f}" if losses else "finished"


def earlier_result(file: epath.Path, config: RunConfig, data: RunData) -> dict[str, Any]:
    """The result of a run that ended before.

    Raises:
      ConfigError: its configuration, one of its plugins or its data are others. Its files stay as they are.
    """
    check_same_run(file.parent, config)
    saved = saved_run(file.parent)
    if saved is None:
        raise ConfigError(f"{file}: lies beside no config.yaml and no checkpoints; choose another run.name")
    _check_measured_alike(file.parent, saved.config, config)
    result = read_result(file)
    check_same_data(result, data, file=file)
    return result


def check_ended_alike(directory: epath.Path, config: RunConfig) -> None:
    """Refuse other keys for a run that was killed between its last step and its result: no checkpoint would hold them.

    Raises:
      ConfigError: names the keys.
    """
    saved = saved_run(directory)
    if saved is not None and saved.step == config.train.steps:
        _check_measured_alike(directory, saved.config, config)


def _check_measured_alike(directory: epath.Path, saved: RunConfig, config: RunConfig) -> None:
    if different := measured_otherwise(saved, config):
        raise ConfigError(f"{directory} holds another run ({'; '.join(different)}): choose another run.name")


def group_of(ended: Sequence[Ended]) -> RunGroup:
    """Runs of one contestant at one rate, by their final losses."""
    finished = [set(each.result["scores"]) for each in ended if each.result["status"] == FINISHED]
    measured = compared_set(finished)
    losses, diverged = {}, {}
    for config, result in ended:
        if result["status"] == FINISHED:
            losses[config.train.seed] = result["scores"][measured]["loss"]
        else:
            diverged[config.train.seed] = result["diverged_at"]
    return RunGroup(losses=losses, diverged=diverged, unfinished=())


def hardware() -> str:
    """The devices as text, such as "1 x cpu (AMD EPYC 7B13, 2 cores)"."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        kind = f"cpu ({_cpu_model()}, {os.cpu_count()} cores)"
    return f"{jax.device_count()} x {kind}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor()
