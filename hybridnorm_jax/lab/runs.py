"""The runs of a comparison, read from their directories, checked to be comparable, and labelled by what differs."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from hybridnorm_jax.config.keys import flatten
from hybridnorm_jax.config.resumption import decides_trajectory
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.values import show
from hybridnorm_jax.config.yaml_files import from_yaml
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.divergence import rising_since

FINISHED, DIVERGED, UNFINISHED = "finished", "diverged", "unfinished"
# What no label shows: the axes of a comparison, and values that follow from others unless they are set.
AXES = ("train.seed", "optimizer.learning_rate")
DERIVED = ("num_kv_heads", "head_dim", "mlp_dim", "attention_norm_scale", "attention_norm_bias", "init_std")
# In what no two runs may differ: losses over other tokens, or other numbers of them, are not compared.
SAME = ("train.steps", "train.batch_size", "train.seq_len", "model.vocab_size", "eval.batches")
SINGLE = ("train/loss", "train/grad_norm", "tokens_per_second")
DATA_MAY_DIFFER = ("data.cache_dir", "data.read_threads")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, as far as it came.

    Attributes:
      name: of its directory.
      label: its scheme and what else differs between the runs, such as "pre, num_layers=29".
      status: finished | diverged | unfinished.
      step: steps made; None where nothing tells.
      diverged_at: the step, if it diverged and that is known.
      scores: validation set -> final loss in nats per token; empty unless finished.
      result: result.json, empty where there is none.
      losses, gradient_norms: (step, value) of training, every step where metrics.jsonl has them; NaN if not finite.
      validation: set -> (step, loss) of every evaluation.
      rates: tokens per second of every line.
      watched: (step, {key without "watch/": values per layer}) of the first and the last such line, or empty.
    """

    name: str
    directory: Path
    config: RunConfig
    label: str
    status: str
    step: int | None
    diverged_at: int | None
    scores: dict[str, float]
    result: dict[str, Any]
    losses: list[tuple[int, float]]
    gradient_norms: list[tuple[int, float]]
    validation: dict[str, list[tuple[int, float]]]
    rates: list[float]
    watched: list[tuple[int, dict[str, list]]]

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
        """Target tokens trained on."""
        made = self.step if self.step is None else self.step * self.config.tokens_per_step
        return self.result.get("tokens", made)


def read_runs(directory: Path) -> list[Run]:
    """All runs in a directory, by label, learning rate and seed.

    A run is a subdirectory with a config.yaml. It has finished or diverged if its result.json says so; without one it
    has finished if metrics.jsonl has an evaluation at train.steps, and diverged if divergence.py says so then. A
    finished run whose loss is not finite diverged.

    Raises:
      UserError: there is no run, a file of one is damaged, two of them are the same, or they cannot be compared.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    found = sorted(file.parent for file in directory.glob("*/config.yaml"))
    if not found:
        hint = "this is a run itself; name the directory above it" if (directory / "config.yaml").exists() else "empty"
        raise UserError(f"{directory}: {hint}: a run is a subdirectory with a config.yaml")
    runs = [_read_run(path) for path in found]
    _check_comparable(directory, runs)
    labels = _labels([run.config for run in runs])
    runs = [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    runs.sort(key=lambda run: (run.label, run.rate, run.seed))
    for one, other in itertools.pairwise(runs):
        if (one.label, one.rate, one.seed) == (other.label, other.rate, other.seed):
            what = f"{one.label}, learning rate {one.rate:g}, seed {one.seed}"
            raise UserError(f"{directory}: {one.name} and {other.name} are the same ({what}): remove one of them")
    return runs


def read_losses(path: Path | epath.Path) -> list[tuple[int, float]]:
    """(step, training loss in nats per token) of a run's directory, every step there is; NaN where not finite."""
    return _series(list(_records(path / "metrics.jsonl")), "train/loss", "train/losses")


def read_object(file: Path | epath.Path) -> dict[str, Any]:
    """The JSON object in a file; UserError where it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def settings(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, of what decides a trajectory; values that follow from others (DERIVED) are None."""
    model = config.model
    plain = dataclasses.replace(model, **dict.fromkeys(DERIVED))
    shown = flatten(dataclasses.asdict(config))
    values = {key: value for key, value in shown if decides_trajectory(key)}
    followed = [name for name in DERIVED if getattr(plain, name) == getattr(model, name)]
    return values | {f"model.{name}": None for name in followed}


def differing(configs: Sequence[RunConfig]) -> list[str]:
    """The keys that decide a trajectory in which configurations differ, without seed and learning rate."""
    every = [settings(config) for config in configs]
    return [key for key in every[0] if key not in AXES and any(one[key] != every[0][key] for one in every)]


def measured_otherwise(one: RunConfig, other: RunConfig) -> list[str]:
    """In what the losses of two configurations are no losses on the same tokens, such as "eval.batches (1 and 2)"."""
    ours, theirs = (dict(flatten(dataclasses.asdict(config))) for config in (one, other))
    keys = [key for key in ours if key in SAME or (key.startswith("data.") and key not in DATA_MAY_DIFFER)]
    shown = ((key, show(ours[key]), show(theirs[key])) for key in keys)
    return [f"{key} ({before} and {now})" for key, before, now in shown if ours[key] != theirs[key]]


def _labels(configs: Sequence[RunConfig]) -> list[str]:
    keys = [key for key in differing(configs) if key != "model.scheme"]
    labels = []
    for config in configs:
        values = settings(config)
        parts = [f"{_short(key, keys)}={show(values[key])}" for key in keys]
        labels.append(", ".join([config.model.scheme, *parts]))
    return labels


def _short(key: str, keys: Sequence[str]) -> str:
    """The last word of a key, if no other of the keys ends with it."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _check_comparable(directory: Path, runs: Sequence[Run]) -> None:
    first, *others = runs
    for other in others:
        for differs in measured_otherwise(first.config, other.config):
            pair = f"{first.name} and {other.name}"
            raise UserError(f"{directory}: {pair} differ in {differs}: such runs are not compared")
    known = [run for run in runs if "train_tokens" in run.result]
    for other in known[1:]:
        before, now = known[0].result["train_tokens"], other.result["train_tokens"]
        if before != now:
            pair = f"{known[0].name} and {other.name}"
            raise UserError(
                f"{directory}: {pair} differ in train_tokens ({before} and {now}): other data are not compared"
            )


def _read_run(path: Path) -> Run:
    try:
        config = from_yaml((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.yaml'}: {str(error).splitlines()[0]}") from error
    records = list(_records(path / "metrics.jsonl"))
    validation: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("eval/") and key.endswith("/loss"):
                validation.setdefault(key[len("eval/") : -len("/loss")], []).append((record["step"], _number(value)))
    status, step, diverged_at, scores, result = _outcome(path, config, records, validation)
    watched = [(record["step"], values) for record in records if (values := _watched(record))]
    return Run(
        name=path.name,
        directory=path,
        config=config,
        label=config.model.scheme,
        status=status,
        step=step,
        diverged_at=diverged_at,
        scores=scores,
        result=result,
        losses=_series(records, "train/loss", "train/losses"),
        gradient_norms=_series(records, "train/grad_norm", "train/grad_norms"),
        validation=validation,
        rates=[record["tokens_per_second"] for record in records if record.get("tokens_per_second")],
        watched=watched if len(watched) < 2 else [watched[0], watched[-1]],
    )


def _outcome(
    path: Path, config: RunConfig, records: list[dict], validation: dict[str, list[tuple[int, float]]]
) -> tuple[str, int | None, int | None, dict[str, float], dict[str, Any]]:
    """(status, step, step of divergence, scores, result.json)."""
    file = path / "result.json"
    result: dict[str, Any] = {}
    if file.exists():
        result = read_result(file)
        status, step, diverged_at = result["status"], result["step"], result.get("diverged_at")
        scores = {name: _number(score["loss"]) for name, score in result["scores"].items()}
    else:
        step, diverged_at = max((record["step"] for record in records), default=None), None
        last = config.train.steps
        scores = {name: points[-1][1] for name, points in validation.items() if points[-1][0] == last}
        status = FINISHED if scores else UNFINISHED
        rising = rising_since(_series(records, "train/loss", "train/losses")) if scores else None
        if rising is not None:
            status, diverged_at = DIVERGED, rising
    if status == FINISHED and not all(map(math.isfinite, scores.values())):
        status, diverged_at = DIVERGED, step
    return status, step, diverged_at, scores if status == FINISHED else {}, result


def read_result(file: Path | epath.Path) -> dict[str, Any]:
    """result.json of a run; UserError that names the file and the key where it is not what compare writes."""
    result = read_object(file)

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    scores = result.get("scores")
    scored = isinstance(scores, dict) and all(isinstance(s, dict) and "loss" in s for s in scores.values())
    scored = scored and all(s["loss"] is None or is_number(s["loss"]) for s in scores.values())
    texts = all(isinstance(result.get(key, ""), str) for key in ("command", "hardware"))
    numbers = all(
        is_number(result[key]) for key in ("train_tokens", "tokens", "seconds", "resumed_from") if key in result
    )
    for key, right, holds in (
        ("status", f"must be {FINISHED} or {DIVERGED}", result.get("status") in (FINISHED, DIVERGED)),
        ("step", "must be an integer", type(result.get("step")) is int),
        ("diverged_at", "must be an integer or null", type(result.get("diverged_at")) in (int, type(None))),
        ("scores", "must map validation sets to objects with a loss", scored),
        ("command, hardware", "must be text", texts),
        ("train_tokens, tokens, seconds, resumed_from", "must be numbers", numbers),
        ("versions", "must map packages to versions", isinstance(result.get("versions", {}), dict)),
    ):
        if not holds:
            raise UserError(f"{file}: {key}: {right}")
    return result


def _records(file: Path | epath.Path) -> Iterator[dict[str, Any]]:
    """The objects of metrics.jsonl. A last line that a killed run left torn is passed over."""
    if not file.exists():
        return
    lines = file.read_bytes().decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and type(record.get("step")) is int and _numbers_alone(record)
        except ValueError:
            whole = False
        if whole:
            yield record
        elif number < len(lines):
            raise UserError(f"{file}, line {number}: not a JSON object with a step and numbers")


def _numbers_alone(record: dict[str, Any]) -> bool:
    """Whether losses and rates are numbers or null, and series are lists of these."""

    def is_number(value: Any) -> bool:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))

    series = [record.get(key, []) for key in ("train/losses", "train/grad_norms")]
    single = [value for key, value in record.items() if key.startswith("eval/") or key in SINGLE]
    return all(isinstance(values, list) and all(map(is_number, values)) for values in series) and all(
        map(is_number, single)
    )


def _series(records: Sequence[dict], single: str, every: str) -> list[tuple[int, float]]:
    """(step, value): all steps since the line before where a line has them, else the line's own."""
    series = []
    for record in records:
        step = record["step"]
        if record.get(every):
            values = record[every]
            series += [(step - len(values) + 1 + i, _number(value)) for i, value in enumerate(values)]
        elif single in record:
            series.append((step, _number(record[single])))
    return series


def _watched(record: dict[str, Any]) -> dict[str, list]:
    """What a line says of the layers, by the key without "watch/"."""
    return {key.removeprefix("watch/"): value for key, value in record.items() if key.startswith("watch/")}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
