"""What the lab reads of a run: result.json, checked, and series of values from metrics.jsonl."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from hybridnorm_jax.errors import UserError, first_line
from hybridnorm_jax.training.metrics_file import STEP_SECONDS, Record, read_records
from hybridnorm_jax.whole_files import write_whole

FINISHED, DIVERGED, UNFINISHED = "finished", "diverged", "unfinished"


class Point(NamedTuple):
    """One value of a series; NaN stands for every value that is not finite."""

    step: int
    value: float


class WatchedStep(NamedTuple):
    """What train.watch_every measured at one step.

    Attributes:
      layers: the key without "watch/" -> one value per layer, or one number outside of the layers; None where there is
        no value.
    """

    step: int
    layers: dict[str, Any]


def read_object(file: Path | epath.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def write_object(file: epath.Path, value: dict[str, Any]) -> None:
    """A JSON file, whole or not at all, by one process of all."""
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Jobs of one comparison write comparison.json at the same time.
        write_whole(file, json.dumps(value, indent=2) + "\n", concurrent=True)


def read_comparison(file: Path | epath.Path) -> dict[str, Any]:
    """A comparison.json; empty where there is no such file.

    Raises:
      UserError: a value is not what `hybridnorm lab compare` writes; the message names the file and the key.
    """
    if not file.exists():
        return {}
    comparison = read_object(file)
    for key, kind, right in (("commands", str, "texts"), ("sweep_seeds", int, "integers")):
        values = comparison.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise UserError(f"{file}: {key}: must be a list of {right}")
    return comparison


def read_result(file: Path | epath.Path) -> dict[str, Any]:
    """The result.json of a run.

    Raises:
      UserError: a value is not what `hybridnorm lab compare` writes; the message names the file and the key.
    """
    result = read_object(file)

    def require(holds: bool, key: str, right: str) -> None:
        if not holds:
            raise UserError(f"{file}: {key}: {right}")

    require(result.get("status") in (FINISHED, DIVERGED), "status", f"must be {FINISHED} or {DIVERGED}")
    require(type(result.get("step")) is int, "step", "must be an integer")
    diverged_at = result.get("diverged_at")
    require(diverged_at is None or type(diverged_at) is int, "diverged_at", "must be an integer or null")
    require(_are_scores(result.get("scores")), "scores", "must map validation sets to objects with a loss")
    texts = ("command", "hardware")
    require(all(isinstance(result.get(key, ""), str) for key in texts), ", ".join(texts), "must be text")
    numbers = ("train_tokens", "tokens", "seconds", "resumed_from")
    require(all(_is_number(result.get(key, 0)) for key in numbers), ", ".join(numbers), "must be numbers")
    require(_is_number_or_null(result.get("compile_seconds")), "compile_seconds", "must be a number or null")
    flops = result.get("flops_per_step")
    require(flops is None or (_is_number(flops) and flops > 0), "flops_per_step", "must be a number above 0 or null")
    require(isinstance(result.get("versions", {}), dict), "versions", "must map packages to versions")
    require(_are_files(result.get("data", {})), "data", "must map keys to files with a name, a size and a digest")
    return result


def _are_files(data: Any) -> bool:
    if not isinstance(data, dict) or not all(isinstance(files, list) for files in data.values()):
        return False
    files = [file for files in data.values() for file in files]
    return all(isinstance(file, dict) and set(file) == {"name", "size", "digest"} for file in files)


def _are_scores(scores: Any) -> bool:
    if not isinstance(scores, dict):
        return False
    return all(
        isinstance(score, dict) and "loss" in score and _is_number_or_null(score["loss"]) for score in scores.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def read_losses(directory: Path | epath.Path) -> list[Point]:
    """The training loss of a run's directory, in nats per token, at every step that metrics.jsonl has."""
    return losses(read_records(directory))


def losses(records: Sequence[Record]) -> list[Point]:
    """The training loss in nats per token."""
    return _series(records, last="train/loss", every="train/losses")


def gradient_norms(records: Sequence[Record]) -> list[Point]:
    """The norm of the gradient before clipping."""
    return _series(records, last="train/grad_norm", every="train/grad_norms")


def _series(records: Sequence[Record], *, last: str, every: str) -> list[Point]:
    """The values of all steps: those of the key `every` where a line has it, else the one of the key `last`."""
    series = []
    for record in records:
        step = record["step"]
        if record.get(every):
            values = record[every]
            first = step - len(values) + 1
            series += [Point(first + index, as_number(value)) for index, value in enumerate(values)]
        elif last in record:
            series.append(Point(step, as_number(record[last])))
    return series


def step_seconds(records: Sequence[Record]) -> list[float]:
    """The seconds of every step that only trained."""
    return [seconds for record in records for seconds in record.get(STEP_SECONDS) or () if seconds is not None]


def compile_seconds(records: Sequence[Record]) -> float | None:
    """The seconds that the process which wrote the last line had compiled for this run by then; None: no line says."""
    totals = [record["time/total_compilation"] for record in records if "time/total_compilation" in record]
    return round(totals[-1], 1) if totals else None


def validation_losses(records: Sequence[Record]) -> dict[str, list[Point]]:
    """Validation set -> its loss in nats per token, at every evaluation."""
    found: dict[str, list[Point]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("eval/") and key.endswith("/loss") and not key.startswith("eval/task/"):
                name = key.removeprefix("eval/").removesuffix("/loss")
                found.setdefault(name, []).append(Point(record["step"], as_number(value)))
    return found


def watched_steps(records: Sequence[Record]) -> list[WatchedStep]:
    """What was measured in the layers, at every step where it was."""
    found = []
    for record in records:
        layers = {key.removeprefix("watch/"): value for key, value in record.items() if key.startswith("watch/")}
        if layers:
            found.append(WatchedStep(record["step"], layers))
    return found


def as_number(value: float | None) -> float:
    """NaN for null, which stands for NaN and infinity in JSON."""
    return math.nan if value is None else float(value)
