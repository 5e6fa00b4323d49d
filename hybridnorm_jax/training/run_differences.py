"""In what runs differ: their keys, data, plugins and environments, the first step at which their losses do."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from hybridnorm_jax.append_only import existing_parts
from hybridnorm_jax.config.key_lookup import ENCODER_FIELDS, FIELDS, default
from hybridnorm_jax.config.resume_keys import decides_trajectory
from hybridnorm_jax.config.yaml_files import gather, read_file
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training import text_log
from hybridnorm_jax.training.loss_series import SERIES
from hybridnorm_jax.training.metrics_file import Record, read_records
from hybridnorm_jax.training.run_listing import named_directory
from hybridnorm_jax.training.run_status import CONFIG, FOREIGN, RunStatus, run_status
from hybridnorm_jax.training.saved_steps import SavedSteps
from hybridnorm_jax.whole_files import is_local

# What is the same run elsewhere, and differs always.
PLACES = ("run.name", "run.dir")
LOSSES = SERIES["loss"]


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """What is compared of a run.

    Attributes:
      path: as it was named.
      status: at a glance.
      keys: dotted key -> its value, also of keys that its configuration does not name.
      plugins: name -> digest; files: name -> (size, digest). None: the run does not say.
      losses: step -> training loss, NaN where it was not finite.
      scores: name of a score -> its newest value; scored: the step of that.
      environment: package -> version, and devices; empty: the run does not say.
    """

    path: str
    status: RunStatus
    keys: dict[str, Any]
    plugins: dict[str, str] | None
    files: dict[str, tuple[int, str]] | None
    losses: dict[int, float]
    scores: dict[str, float]
    scored: dict[str, int]
    environment: dict[str, str]


class Difference(NamedTuple):
    """Something that is not the same in all runs: its name, and the value of each run, None where it has none."""

    name: str
    values: list[Any]


class LossDifference(NamedTuple):
    """How the losses of a run compare with those of the first.

    Attributes:
      compared: how many steps both have.
      first: the first of them at which the losses are not the same number; None: there is none.
      before, now: the losses there, of the first run and of this one.
    """

    compared: int
    first: int | None = None
    before: float | None = None
    now: float | None = None


def read_run(path: str) -> ComparedRun:
    """A run that is to be compared; what its newest checkpoint says counts, or its config.yaml where there is none.

    Raises:
      UserError: there is no run, or its configuration cannot be read.
    """
    directory = named_directory(path)
    if not directory.exists():
        raise UserError(f"{path}: no such directory")
    status = run_status(directory)
    if status.status == FOREIGN:
        raise UserError(f"{path}: no run, it has no {CONFIG}")
    text, origin, plugins, files = _saved(directory)
    settings = gather([(origin, text)], [], known=FIELDS | ENCODER_FIELDS)
    records = read_records(directory)
    scores, scored = _scores(records)
    return ComparedRun(
        path=path,
        status=status,
        keys={name: settings.get(name, default(field)) for name, field in FIELDS.items()} | settings,
        plugins=None if plugins is None else {plugin["name"]: plugin["digest"] for plugin in plugins},
        files=None if files is None else {file["name"]: (file["size"], file["digest"]) for file in files},
        losses=_losses(records),
        scores=scores,
        scored=scored,
        environment=_environment(directory),
    )


def key_differences(runs: Sequence[ComparedRun]) -> list[Difference]:
    """The keys that differ; those that decide the training come first."""
    found = _differences([run.keys for run in runs])
    found = [difference for difference in found if difference.name not in PLACES]
    return sorted(found, key=lambda difference: not decides_trajectory(difference.name))


def data_differences(runs: Sequence[ComparedRun]) -> list[Difference] | None:
    """The files of which not all runs had the same; None where not all say which files they had."""
    return _differences_where_known([run.files for run in runs])


def plugin_differences(runs: Sequence[ComparedRun]) -> list[Difference] | None:
    """The same of plugins, by their digests."""
    return _differences_where_known([run.plugins for run in runs])


def environment_differences(runs: Sequence[ComparedRun]) -> list[Difference] | None:
    """The same of what computed the runs last."""
    return _differences_where_known([run.environment or None for run in runs])


def loss_difference(first: ComparedRun, other: ComparedRun) -> LossDifference:
    """Where the losses of two runs part, compared as numbers, without a tolerance."""
    steps = sorted(first.losses.keys() & other.losses.keys())
    for step in steps:
        before, now = first.losses[step], other.losses[step]
        if before != now and not (math.isnan(before) and math.isnan(now)):
            return LossDifference(len(steps), step, before, now)
    return LossDifference(len(steps))


def _differences(of_each: Sequence[Mapping[str, Any]]) -> list[Difference]:
    names = dict.fromkeys(name for values in of_each for name in values)
    found = [Difference(name, [values.get(name) for values in of_each]) for name in names]
    return [one for one in found if any(value != one.values[0] for value in one.values)]


def _differences_where_known(of_each: Sequence[Mapping[str, Any] | None]) -> list[Difference] | None:
    known = [values for values in of_each if values is not None]
    return _differences(known) if len(known) == len(of_each) else None


def _saved(directory: epath.Path) -> tuple[str, str, list[dict[str, Any]] | None, list[dict[str, Any]] | None]:
    """(configuration, where it is, plugins, files); of the last two None where nothing says them."""
    if (directory / "checkpoints").exists():
        checkpoints = SavedSteps(directory / "checkpoints")
        glance = checkpoints.glance()
        if glance is not None:
            return glance.config_yaml, f"{directory}, step {glance.step}", glance.plugins, glance.files
    file = directory / CONFIG
    return read_file(file) if is_local(file) else file.read_text(), str(file), None, None


def _losses(records: Sequence[Record]) -> dict[int, float]:
    """The losses of all steps that metrics.jsonl has: a line holds those since the line before it."""
    found = {}
    for record in records:
        values = record.get(LOSSES) or ()
        for step, value in enumerate(values, record["step"] - len(values) + 1):
            found[step] = math.nan if value is None else value
        if not values and "train/loss" in record:
            found[record["step"]] = math.nan if record["train/loss"] is None else record["train/loss"]
    return found


def _scores(records: Sequence[Record]) -> tuple[dict[str, float], dict[str, int]]:
    """The newest evaluations: name -> value, and name -> step."""
    scores, scored = {}, {}
    for record in records:
        for name, value in record.items():
            if name.startswith("eval/"):
                scores[name.removeprefix("eval/")] = math.nan if value is None else value
                scored[name.removeprefix("eval/")] = record["step"]
    return scores, scored


def _environment(directory: epath.Path) -> dict[str, str]:
    """What the newest `start:` line of the log says."""
    newest: dict[str, Any] = {}
    for part in existing_parts(directory / text_log.NAME):
        for line in part.read_bytes().decode(errors="replace").splitlines():
            said = line.partition(" ")[2]
            if said.startswith(text_log.START):
                try:
                    newest = json.loads(said.removeprefix(text_log.START))
                except ValueError:
                    continue
    versions = newest.get("versions", {}) if isinstance(newest, dict) else {}
    more = {name: str(newest[name]) for name in ("devices", "processes") if name in newest}
    return {str(name): str(version) for name, version in versions.items()} | more
