"""metrics.jsonl: how its lines are written and read. metrics_writer.py says where else the numbers go.

A line is a JSON object with a "step", or says that the run went on from an earlier step:

    {"step": 510, "train/loss": 2.31, ...}
    {"resumed_from": 500, "time": "2026-11-26T08:24:25+00:00"}

The second kind supersedes the lines before it that are about later steps. Nothing is ever taken out of the file.
"""

import datetime
import json
import sys
from typing import Any, NamedTuple

from etils import epath

from hybridnorm_jax.append_only import AppendOnlyFile, existing_parts, read_parts

NAME = "metrics.jsonl"
ROLLBACK = "resumed_from"
# Keys that hold one number, besides those of evaluations; and keys that hold one for every step.
NUMBER_KEYS = ("train/loss", "train/grad_norm", "tokens_per_second")
STEP_SECONDS = "time/step_seconds"
SERIES_KEYS = ("train/losses", "train/grad_norms", STEP_SECONDS)

# Values by layer, whose lists are single values to loggers.
BY_LAYER = "watch/"

Record = dict[str, Any]


class Metrics(NamedTuple):
    """What the metrics.jsonl of a run says.

    Attributes:
      records: the lines about steps, without those that a later rollback supersedes; "step" is an integer.
      superseded_records: those.
      unreadable: "FILE, line NUMBER" of each line that is neither a record nor a rollback. The line that a killed
        process did not complete is not among them.
      is_torn: whether the file ends with such a line.
    """

    records: list[Record]
    superseded_records: list[Record]
    unreadable: list[str]
    is_torn: bool

    @property
    def superseded(self) -> int:
        """How many lines are superseded."""
        return len(self.superseded_records)


_said: set[str] = set()


def read_records(directory: epath.PathLike) -> list[Record]:
    """The records of a run's directory; none where there is no metrics.jsonl. Says once if lines are unreadable."""
    metrics = read_metrics(directory)
    if metrics.unreadable:
        count = len(metrics.unreadable)
        line = f"{metrics.unreadable[0]}: not a JSON object with a step and numbers; skipped, {count} such line(s)"
        if line not in _said:
            _said.add(line)
            print(line, file=sys.stderr)
    return metrics.records


def read_metrics(directory: epath.PathLike) -> Metrics:
    """All that the metrics.jsonl of a run's directory says."""
    parts = existing_parts(epath.Path(directory) / NAME)
    records: list[Record] = []
    superseded: list[Record] = []
    unreadable: list[str] = []
    was_readable, is_torn = True, False
    for part, content in zip(parts, read_parts(parts), strict=True):
        *lines, rest = content.decode(errors="replace").split("\n")
        is_torn = bool(rest) and parse_line(rest) is None
        if rest and not is_torn:
            lines.append(rest)
        for number, line in enumerate(lines, 1):
            value = parse_line(line)
            if value is None:
                unreadable.append(f"{part}, line {number}")
            elif ROLLBACK in value:
                if not was_readable:  # torn by the kill after which the run went on
                    unreadable.pop()
                kept = [record for record in records if record["step"] <= value[ROLLBACK]]
                superseded += [record for record in records if record["step"] > value[ROLLBACK]]
                records = kept
            else:
                records.append(value)
            was_readable = value is not None
    return Metrics(records, superseded, unreadable, is_torn)


class MetricsFile:
    """The metrics.jsonl of a run that goes on from a step.

    Args:
      directory: of the run; exists.
      resume_step: what was recorded of later steps is superseded. 0: of all steps.

    Attributes:
      before: what it said, as of then: what is superseded now is among its superseded_records.
      superseded: how many lines that was.

    Raises:
      OSError: it cannot be written.
    """

    def __init__(self, directory: epath.Path, *, resume_step: int):
        self.path = directory / NAME
        found = read_metrics(directory)
        kept = [record for record in found.records if record["step"] <= resume_step]
        gone = [record for record in found.records if record["step"] > resume_step]
        self.superseded = len(gone)
        self.before = found._replace(records=kept, superseded_records=found.superseded_records + gone)
        self._file = AppendOnlyFile(self.path)
        self._file.open()
        if found.is_torn or gone:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.append({ROLLBACK: resume_step, "time": now})

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; raises OSError."""
        self._file.append(json.dumps(entry, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def single_values(record: Record) -> dict[str, float]:
    """The numbers of a record, without its step and what is null; those of each layer as watch/NAME/000 and so on."""
    single = {}
    for name, value in record.items():
        if isinstance(value, list) and name.startswith(BY_LAYER):
            single |= {f"{name}/{number:03d}": part for number, part in enumerate(value)}
        elif name != "step":
            single[name] = value
    return {name: float(value) for name, value in single.items() if value is not None and _is_number_or_null(value)}


def parse_line(line: str) -> Record | None:
    """A record or a rollback; None for any other line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if ROLLBACK in value:
        return value if type(value[ROLLBACK]) is int else None
    if type(value.get("step")) is not int:
        return None
    for key, entry in value.items():
        is_single = key in NUMBER_KEYS or key.startswith("eval/")
        if is_single and not _is_number_or_null(entry):
            return None
        if key in SERIES_KEYS and not (isinstance(entry, list) and all(map(_is_number_or_null, entry))):
            return None
    return value


def _is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
