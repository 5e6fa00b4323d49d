"""The newest numbers of a run, from the end of its metrics.jsonl: what `hybridnorm runs` shows of a thousand runs.

Nothing here imports JAX.
"""

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from hybridnorm_jax.append_only import existing_parts
from hybridnorm_jax.training.metrics_file import NAME, ROLLBACK, Record, parse_line
from hybridnorm_jax.whole_files import is_local, size_of

# The last piece that is read of a file; pieces before it are each twice as large, until all is found, to this sum.
PIECE_BYTES, MOST_BYTES = 16 * 1024, 4 * 1024**2
LOSS, RATE, EVALUATION, TASK = "train/loss", "tokens_per_second", "eval/", "eval/task/"


class Newest(NamedTuple):
    """What the newest lines say; None where none of those that were read says it.

    Attributes:
      step: of the last line.
      loss: of training, NaN where it was not finite; rate: tokens per second.
      validation: validation set -> its loss, of the newest evaluation; evaluated: its step.
    """

    step: int | None = None
    loss: float | None = None
    rate: float | None = None
    validation: dict[str, float] | None = None
    evaluated: int | None = None


def newest_metrics(directory: epath.Path) -> Newest:
    """The newest numbers in a run's directory, without superseded ones. Raises OSError."""
    newest, limit = Newest(), math.inf
    for line in _lines_backwards(directory):
        has_evaluation = f'"{EVALUATION}'.encode() in line
        if newest.rate is not None and not has_evaluation and ROLLBACK.encode() not in line:
            continue
        record = parse_line(line.decode(errors="replace"))
        if record is None:
            continue
        if ROLLBACK in record:
            limit = min(limit, record[ROLLBACK])
        elif record["step"] <= limit:
            newest = _with_older(newest, record)
        if newest.rate is not None and newest.validation is not None:
            break
    return newest


def _with_older(newest: Newest, record: Record) -> Newest:
    """What is known, with what an older line says besides."""
    found = newest._asdict()
    if newest.step is None:
        found["step"] = record["step"]
    if newest.loss is None and LOSS in record:
        found["loss"] = math.nan if record[LOSS] is None else record[LOSS]
    if newest.rate is None:
        found["rate"] = record.get(RATE)
    losses = {
        name.removeprefix(EVALUATION).removesuffix("/loss"): math.nan if value is None else value
        for name, value in record.items()
        if name.startswith(EVALUATION) and name.endswith("/loss") and not name.startswith(TASK)
    }
    if newest.validation is None and losses:
        found |= {"validation": losses, "evaluated": record["step"]}
    return Newest(**found)


def _lines_backwards(directory: epath.Path) -> Iterator[bytes]:
    """The lines of a run's metrics.jsonl, the last one first, up to MOST_BYTES."""
    left = MOST_BYTES
    for part in reversed(existing_parts(directory / NAME)):
        end, begun, piece = size_of(part), b"", PIECE_BYTES
        while end > 0 and left > 0:
            start = max(end - piece, 0)
            text = read_piece(part, start, end) + begun
            # Before the first end of line there may be the rest of a line.
            begun, *lines = text.split(b"\n") if start else [b"", *text.split(b"\n")]
            yield from (line for line in reversed(lines) if line)
            left -= end - start
            end, piece = start, 2 * piece


def read_piece(file: epath.Path, start: int, end: int) -> bytes:
    """Some bytes of a file. Raises OSError."""
    if not is_local(file):
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start)
    with open(os.fspath(file), "rb") as stream:
        stream.seek(start)
        return stream.read(end - start)
