"""The parts of the section `data` that mix several sources: the sources, and the stages that change their weights."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from hybridnorm_jax.config.data_file_names import source_of
from hybridnorm_jax.config.limits import LARGEST_WEIGHT, MOST_STEPS
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key, shortened
from hybridnorm_jax.errors import ConfigError, did_you_mean

AUTO = "auto"
UNITS = ("tokens", "documents")
# A name is part of keys, of metrics and of the names of validation sets.
NAME = re.compile(r"[A-Za-z0-9_-]{1,60}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class SourceSection:
    """One source of data.mixture. What it does not say is as the section `data` says."""

    files: tuple[str, ...] = key((), "paths or glob patterns, as data.files; none for the standard library")
    weight: float = key(
        1.0, "its share is its weight / the sum of all weights; 0: not read", at_least=0, at_most=LARGEST_WEIGHT
    )
    source: str = key(AUTO, "stdlib | text | tokens, as data.source; auto: what the files' names say")
    text_field: str | None = key(None, "as data.text_field; null: the same")
    filter: tuple[str, ...] | None = key(None, "as data.filter; null: the same")
    records: str | None = key(None, "as data.records; null: the same")
    token_dtype: str | None = key(None, "as data.token_dtype; null: the same")
    epochs: float | None = key(
        None,
        "a run that would read the source more often than this is refused; null: no limit",
        above=0,
        at_most=LARGEST_WEIGHT,
    )

    @property
    def kind(self) -> str | None:
        """What reads its files: stdlib, text or tokens; None: their names do not say so, or say both."""
        if self.source != AUTO:
            return self.source
        kinds = {source_of(name) for name in self.files}
        return kinds.pop() if len(kinds) == 1 else None


@dataclasses.dataclass(frozen=True)
class StageSection:
    """One stage of data.stages: from a step on, other weights."""

    at: float = key(
        0.0,
        "the stage begins after so many steps; below 1: after this share of train.steps",
        at_least=0,
        at_most=MOST_STEPS,
    )
    weights: dict[str, float] = key(
        {},
        "source -> weight; a source that is left out is not read in this stage",
        at_least=0,
        at_most=LARGEST_WEIGHT,
    )

    def step(self, steps: int) -> int:
        """After how many of a run's steps it begins."""
        return round(self.at * steps) if self.at < 1 else round(self.at)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of a run with the same weights.

    Attributes:
      step: how many steps were made before it.
      weights: source -> weight; those above 0 only, by name, their sum is 1.
    """

    step: int
    weights: dict[str, float]


def check_mixture(
    mixture: Mapping[str, SourceSection], stages: Sequence[StageSection], *, sources: Sequence[str]
) -> None:
    """Raise ConfigError for what can be seen to be wrong without the files and the number of steps.

    Args:
      mixture, stages: data.mixture and data.stages.
      sources: what a source may be: stdlib, text, tokens.
    """
    for name, one in mixture.items():
        _check_source(name, one, sources, others=[other for other in mixture if other != name])
    weights = {name: one.weight for name, one in mixture.items()}
    _check_weights("data.mixture", weights)
    for number, stage in enumerate(stages):
        where = f"data.stages: stage {number + 1}"
        _check_stage(where, stage)
        for name in stage.weights:
            if name not in mixture:
                wrong = f"{where}: {shortened(name)} is no source of data.mixture"
                raise ConfigError(wrong + did_you_mean(name, mixture))
        if not stage.weights:
            raise ConfigError(f"{where}: needs weights, such as {{at: 0.9, weights: {{{next(iter(mixture))}: 1}}}}")
        _check_weights(f"{where}: weights", stage.weights)


def _check_source(name: str, one: SourceSection, sources: Sequence[str], *, others: Sequence[str]) -> None:
    path = f"data.mixture.{name}"
    if not NAME.fullmatch(name):
        right = "the name of a source has 1 to 60 letters, digits, - and _"
        raise ConfigError(f"data.mixture: {shortened(name)!r}: {right}")
    if name.startswith("train"):
        right = "its held-out part has the name of the source, and a validation set whose name begins so is trained on"
        raise ConfigError(f"{path}: {right}; choose another name")
    if name == "validation":
        raise ConfigError(f"{path}: a set of that name is the mean of all sources; choose another name")
    check_fields(path, one)
    check_choice(f"{path}.source", one.source, (AUTO, *sources))
    if one.source == "stdlib":
        check(not one.files, f"{path}.files", one.files, "source: stdlib reads no files; use source: text")
        return
    # One that was only mistyped in key=value has no files.
    near = did_you_mean(name, others) if others else ""
    right = f"needs at least one file, or source: stdlib{near.replace('; known:', '; other sources:')}"
    check(bool(one.files), f"{path}.files", "[]", right)
    right = "their names do not say whether they hold text or tokens, or say both; set source: text or source: tokens"
    check(one.kind is not None, f"{path}.files", one.files, right)


def _check_weights(where: str, weights: Mapping[str, float]) -> None:
    if not sum(weights.values()) > 0:
        shown = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items())
        raise ConfigError(f"{where}: the weights ({shown}) sum to 0; at least one must be above 0")


def _check_stage(where: str, stage: StageSection) -> None:
    try:
        check_fields("", stage)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    right = "a step must be a whole number; a share of train.steps is below 1"
    check(stage.at > 0, f"{where}: at", f"{stage.at:g}", "must be above 0; data.mixture has the weights of the begin")
    check(stage.at < 1 or stage.at.is_integer(), f"{where}: at", stage.at, right)


def stages_of(mixture: Mapping[str, SourceSection], stages: Sequence[StageSection], steps: int) -> tuple[Stage, ...]:
    """The stages of a run, the first one from its begin on.

    Args:
      mixture, stages: data.mixture and data.stages, checked.
      steps: of the whole run.

    Raises:
      ConfigError: a stage begins with or before the one before it, or not before the end.
    """
    found = [Stage(0, normalized({name: one.weight for name, one in mixture.items()}))]
    for number, stage in enumerate(stages):
        where = f"data.stages: stage {number + 1}: at={stage.at:g}"
        step, before = stage.step(steps), found[-1].step
        begins = "" if stage.at >= 1 else f" is step {step:,}, which"
        if step <= before:
            after = "the beginning of the run" if number == 0 else f"stage {number}, which begins after step {before:,}"
            raise ConfigError(f"{where}:{begins} must be after {after}; order the stages by their steps")
        if step >= steps:
            raise ConfigError(f"{where}:{begins} must be before the end of the run, train.steps={steps:,}")
        found.append(Stage(step, normalized(stage.weights)))
    return tuple(found)


def normalized(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights above 0, by name, divided by their sum: neither order nor scale of what was written matters."""
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
