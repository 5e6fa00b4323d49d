"""The runs of a comparison, read from their directories, checked to be comparable, and labelled by what differs."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from hybridnorm_jax.config.plugins import imported, plugins_of, to_json
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError, first_line
from hybridnorm_jax.lab import run_files
from hybridnorm_jax.lab.divergence import rising_since
from hybridnorm_jax.lab.labels import STEPS, labels, measured_otherwise
from hybridnorm_jax.lab.run_data import TRAINED_ON, RunData
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED, UNFINISHED, Point, WatchedStep
from hybridnorm_jax.lab.run_protocols import check_budget, operations, other_protocol
from hybridnorm_jax.training.metrics_file import Record, read_records
from hybridnorm_jax.training.run_identity import check_same_plugins, saved_run


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, up to where it came.

    Attributes:
      name: of its directory.
      config: what its newest checkpoint says or, where it has none, config.yaml, which may have been edited.
      plugins: what it was trained with, as in run_identity.SavedRun; None where nothing says so.
      data: the files that it was trained and scored on, by key as in run_data.RunData, as far as something says so.
      label: its scheme and what else differs between the runs, such as "pre, num_layers=29".
      status: finished | diverged | unfinished.
      step: how many steps it made; None where no file says so.
      diverged_at: the step at which it diverged; None where it did not, or where that is unknown.
      scores: validation set -> final loss in nats per token; empty unless the run finished.
      result: the content of result.json; empty where there is no such file.
      losses: training loss in nats per token, at every step that metrics.jsonl has.
      gradient_norms: the same for the norm of the gradient before clipping.
      validation: validation set -> its loss at every evaluation.
      step_seconds: of every step that only trained (training/step_clock.py).
      watched: the first and the last step that was watched; one or none where there are no two.
    """

    name: str
    directory: Path
    config: RunConfig
    plugins: list[dict[str, Any]] | None
    data: dict[str, list[dict[str, Any]]]
    label: str
    status: str
    step: int | None
    diverged_at: int | None
    scores: dict[str, float]
    result: dict[str, Any]
    losses: list[Point]
    gradient_norms: list[Point]
    validation: dict[str, list[Point]]
    step_seconds: list[float]
    watched: list[WatchedStep]

    @property
    def scheme(self) -> str:
        """model.scheme."""
        return self.config.model.scheme

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.config.optimizer.learning_rate

    @property
    def seed(self) -> int:
        """train.seed."""
        return self.config.train.seed

    @property
    def tokens(self) -> int | None:
        """How many target tokens it was trained on; None where that is unknown."""
        made = None if self.step is None else self.step * self.config.tokens_per_step
        return self.result.get("tokens", made)

    @property
    def operations(self) -> float | None:
        """How many arithmetic operations all of its steps take; None where result.json does not say."""
        return operations(self.config.train.steps, self.result)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """How a run ended; the attributes are those of Run."""

    status: str
    step: int | None
    diverged_at: int | None
    scores: dict[str, float]
    result: dict[str, Any]


def read_runs(directory: Path) -> list[Run]:
    """All runs in a directory, by label, learning rate and seed.

    A run is a subdirectory with a config.yaml. Its result.json says whether it finished or diverged. Where there is no
    such file, a run finished if metrics.jsonl has an evaluation at train.steps, and diverged if, besides,
    divergence.rising_since says so. A finished run whose final loss is not finite diverged.

    Raises:
      UserError: there is no run, a file of one is damaged, two of them are the same, or they cannot be compared.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    found = sorted(file.parent for file in directory.glob("*/config.yaml"))
    if not found:
        is_run = (directory / "config.yaml").exists()
        hint = "this is a run itself; name the directory above it" if is_run else "empty"
        raise UserError(f"{directory}: {hint}: a run is a subdirectory with a config.yaml")
    runs = [_read_run(path) for path in found]
    flops = _flops_budget(directory)
    _check_protocols(directory, runs, flops)
    _check_comparable(directory, runs, flops)
    _check_imported(runs)
    of_each = labels([run.config for run in runs], unnamed=_follow_from_budget(flops))
    runs = [dataclasses.replace(run, label=label) for run, label in zip(runs, of_each, strict=True)]
    runs.sort(key=_place)
    for one, other in itertools.pairwise(runs):
        if _place(one) == _place(other):
            what = f"{one.label}, learning rate {one.rate:g}, seed {one.seed}"
            raise UserError(f"{directory}: {one.name} and {other.name} are the same ({what}): remove one of them")
    return runs


def check_addition(
    directory: Path, configs: Sequence[RunConfig], data: RunData, command: str, flops: float | None = None
) -> None:
    """Refuse to train runs beside others that read_runs would not compare them with.

    Args:
      directory: of the runs; it need not be there yet.
      configs: of those to train. Of those among them that are there already only the protocol is looked at.
      data: theirs.
      command: that asks for them.
      flops: their budget of operations, which comparison.json is to name; None: they have another.

    Raises:
      UserError: names two runs, and in what they differ.
    """
    asked = {config.run.name for config in configs}
    found = []
    for file in sorted(directory.glob("*/config.yaml")):
        # A run that cannot be read is the report's to refuse: it may need a plugin that this comparison does not.
        with contextlib.suppress(UserError):
            found.append(_read_run(file.parent))
    planned = [_planned(config, data, command) for config in configs]
    try:
        _check_protocols(directory, [*planned, *found], flops)
        others = [run for run in found if run.name not in asked]
        if others:
            _check_comparable(directory, [*planned, *others], flops)
    except UserError as error:
        raise UserError(f"{error}; choose another run.name") from error


def _planned(config: RunConfig, data: RunData, command: str) -> Run:
    """A run that is to be trained."""
    return Run(
        name=config.run.name,
        directory=Path(config.run.dir) / config.run.name,
        config=config,
        plugins=to_json(plugins_of(config.run.plugins)),
        data=data.files,
        label=config.model.scheme,
        status=UNFINISHED,
        step=0,
        diverged_at=None,
        scores={},
        result={"train_tokens": data.train_tokens, "command": command},
        losses=[],
        gradient_norms=[],
        validation={},
        step_seconds=[],
        watched=[],
    )


def _place(run: Run) -> tuple[str, float, int]:
    """What tells runs apart, and orders them."""
    return run.label, run.rate, run.seed


def _check_comparable(directory: Path, runs: Sequence[Run], flops: float | None) -> None:
    may_differ = _follow_from_budget(flops)
    first, *others = runs
    for other in others:
        differences = measured_otherwise(first.config, other.config, may_differ)
        if differences:
            pair = f"{first.name} and {other.name}"
            raise UserError(f"{directory}: {pair} differ in {differences[0]}: such runs cannot be compared")
    _check_same_data(directory, runs)
    for one, other in itertools.combinations(runs, 2):
        plugin = _other_plugin(one, other)
        if plugin is not None:
            pair = f"{one.name} and {other.name}"
            right = "what other plugins made cannot be compared"
            raise UserError(f"{directory}: {pair} differ in the plugin {plugin}: {right}")


def _check_protocols(directory: Path, runs: Sequence[Run], flops: float | None) -> None:
    """Refuse runs with different budgets, or whose rates were chosen differently, as far as their commands say."""
    told = [run for run in runs if run.result.get("command")]
    for other in told[1:]:
        difference = other_protocol(told[0].result["command"], other.result["command"])
        if difference is not None:
            pair = f"{told[0].name} and {other.name}"
            right = "runs of different protocols cannot be compared"
            raise UserError(f"{directory}: {pair} were asked for with different {difference}: {right}")
    if flops is not None:
        for run in runs:
            check_budget(str(run.directory), run.config.train.steps, run.result, flops)


def _follow_from_budget(flops: float | None) -> tuple[str, ...]:
    """Keys that may differ and that no label names: the steps of runs whose budget is a number of operations."""
    return () if flops is None else (STEPS,)


def _flops_budget(directory: Path) -> float | None:
    """`flops` of comparison.json; None where the runs have another budget."""
    file = directory / "comparison.json"
    flops = run_files.read_comparison(file).get("flops")
    if flops is not None and (not isinstance(flops, int | float) or not flops > 0):
        raise UserError(f"{file}: flops: must be a number above 0, or null")
    return flops


def _other_plugin(one: Run, other: Run) -> str | None:
    """A plugin of one name and two contents, or, between runs of one scheme, one that only one of them had."""
    if one.plugins is None or other.plugins is None:
        return None
    ours, theirs = ({plugin["name"]: plugin["digest"] for plugin in run.plugins} for run in (one, other))
    edited = next((name for name, digest in ours.items() if theirs.get(name, digest) != digest), None)
    if edited is not None or one.scheme != other.scheme:
        return edited
    shared = {*ours.values()} & {*theirs.values()}
    return next((name for name, digest in [*ours.items(), *theirs.items()] if digest not in shared), None)


def _check_imported(runs: Sequence[Run]) -> None:
    """Refuse what this start has imported, where a run was trained with another version of it."""
    for run in runs:
        if run.config.run.plugins and run.plugins is not None:
            kept = epath.Path(run.directory)
            check_same_plugins(run.plugins, imported(), where=str(run.directory), kept=kept, more_allowed=True)


def _check_same_data(directory: Path, runs: Sequence[Run]) -> None:
    """Refuse runs on different data, as far as their results and checkpoints say what these are."""
    right = "runs on different data cannot be compared"
    counted = [run for run in runs if "train_tokens" in run.result]
    for other in counted[1:]:
        before, now = counted[0].result["train_tokens"], other.result["train_tokens"]
        if before != now:
            pair = f"{counted[0].name} and {other.name}"
            raise UserError(f"{directory}: {pair} differ in train_tokens ({before} and {now}): {right}")
    for key in dict.fromkeys(key for run in runs for key in run.data):
        first, *others = [run for run in runs if key in run.data]
        for other in others:
            if other.data[key] != first.data[key]:
                raise UserError(f"{directory}: {first.name} and {other.name} differ in the files of {key}: {right}")


def _read_run(path: Path) -> Run:
    try:
        saved = saved_run(epath.Path(path))
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {first_line(error)}") from error
    if saved is None:
        raise UserError(f"{path}: its config.yaml has gone")
    config = saved.config
    records = read_records(path)
    outcome = _outcome(path / "result.json", config, records)
    watched = run_files.watched_steps(records)
    return Run(
        name=path.name,
        directory=path,
        config=config,
        plugins=saved.plugins,
        data=_trained_on(saved.files) | outcome.result.get("data", {}),
        label=config.model.scheme,
        status=outcome.status,
        step=outcome.step,
        diverged_at=outcome.diverged_at,
        scores=outcome.scores,
        result=outcome.result,
        losses=run_files.losses(records),
        gradient_norms=run_files.gradient_norms(records),
        validation=run_files.validation_losses(records),
        step_seconds=run_files.step_seconds(records),
        watched=watched if len(watched) < 2 else [watched[0], watched[-1]],
    )


def _trained_on(files: list[dict[str, Any]] | None) -> dict[str, list[dict[str, Any]]]:
    return {} if files is None else {TRAINED_ON: files}


def _outcome(file: Path, config: RunConfig, records: list[Record]) -> _Outcome:
    outcome = _recorded_outcome(file) if file.exists() else _deduced_outcome(config, records)
    if outcome.status == FINISHED and not all(math.isfinite(loss) for loss in outcome.scores.values()):
        outcome = dataclasses.replace(outcome, status=DIVERGED, diverged_at=outcome.step)
    return outcome if outcome.status == FINISHED else dataclasses.replace(outcome, scores={})


def _recorded_outcome(file: Path) -> _Outcome:
    """What a result.json says."""
    result = run_files.read_result(file)
    return _Outcome(
        status=result["status"],
        step=result["step"],
        diverged_at=result.get("diverged_at"),
        scores={name: run_files.as_number(score["loss"]) for name, score in result["scores"].items()},
        result=result,
    )


def _deduced_outcome(config: RunConfig, records: list[Record]) -> _Outcome:
    """What metrics.jsonl says of a run without a result.json."""
    last_points = {name: points[-1] for name, points in run_files.validation_losses(records).items()}
    scores = {name: point.value for name, point in last_points.items() if point.step == config.train.steps}
    status, diverged_at = UNFINISHED, None
    if scores:
        diverged_at = rising_since(run_files.losses(records))
        status = FINISHED if diverged_at is None else DIVERGED
    step = max((record["step"] for record in records), default=None)
    return _Outcome(status=status, step=step, diverged_at=diverged_at, scores=scores, result={})
