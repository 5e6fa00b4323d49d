"""metrics.csv: the single values of metrics.jsonl as a table, one row a step and one column a name."""

import csv
import io
import os
import time
from collections.abc import Iterable, Mapping
from typing import IO

from hybridnorm_jax.loggers.logger import LoggedRun, Logger, Point
from hybridnorm_jax.whole_files import is_local

NAME = "metrics.csv"
STEP = "step"
# In a bucket the whole table is uploaded each time: so rarely, and only once it has grown by this share.
UPLOAD_SECONDS, UPLOAD_GROWTH = 60.0, 0.05


class CsvTable(Logger):
    """Writes <run>/metrics.csv. A name that appears later becomes one more column, and its earlier cells are empty.

    The table holds nothing that metrics.jsonl does not. So it is made anew from the history whenever a run goes on, and
    a step that was superseded is not in it. A local file has every value when `write` returns.
    """

    def __init__(self) -> None:
        self._columns: list[str] = [STEP]
        self._row: dict[str, float] = {}
        self._row_begins = 0

    def start(self, run: LoggedRun) -> Mapping[str, int]:
        """Write the table of the history."""
        self._path = run.directory / NAME
        self._is_local = is_local(self._path)
        self._uploaded, self._next = 0, time.monotonic() + UPLOAD_SECONDS
        self._columns += dict.fromkeys(name for point in run.history for name in point.values)
        rows: dict[int, dict[str, float]] = {}
        for point in run.history:
            rows.setdefault(point.step, {}).update(point.values)
        self._replace(Point(step, values) for step, values in rows.items())
        return run.last_steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row, or to the last row where that is about the same step."""
        new = [name for name in values if name not in self._columns]
        if new:
            self._columns += new
            rows, before = list(self._rows()), self._file
            self._replace(rows)
            before.close()
        if self._row.get(STEP) == step:
            self._file.seek(self._row_begins)
            self._file.truncate()
            values = {**self._row, **values}
        self._append(step, values)
        self._file.flush()
        self._upload(at_once=False)

    def close(self, how: str) -> None:
        """Upload what was held back, and release the file."""
        self._upload(at_once=True)
        self._file.close()

    def _rows(self) -> Iterable[Point]:
        """What the file holds."""
        self._file.seek(0)
        for row in csv.DictReader(io.StringIO(self._file.read().decode(), newline="")):
            step = int(row.pop(STEP))
            yield Point(step, {name: float(text) for name, text in row.items() if text})

    def _replace(self, rows: Iterable[Point]) -> None:
        """Write the table with these rows and all columns, whole or not at all."""
        partial = os.fspath(self._path) + ".partial"
        self._file: IO[bytes] = open(partial, "w+b") if self._is_local else io.BytesIO()  # noqa: SIM115
        self._file.write(_line(self._columns))
        self._row = {}
        for row in rows:
            self._append(row.step, row.values)
        self._file.flush()
        if self._is_local:
            os.replace(partial, self._path)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._row_begins = self._file.tell()
        self._row = {**values, STEP: step}
        self._file.write(_line([_text(self._row[name]) if name in self._row else "" for name in self._columns]))

    def _upload(self, *, at_once: bool) -> None:
        """To the bucket, if the run is in one."""
        size = self._file.seek(0, os.SEEK_END)
        is_due = time.monotonic() >= self._next and size >= self._uploaded * (1 + UPLOAD_GROWTH)
        if self._is_local or not (at_once or is_due):
            return
        self._file.seek(0)
        self._path.write_bytes(self._file.read())
        self._uploaded, self._next = size, time.monotonic() + UPLOAD_SECONDS


def _text(value: float) -> str:
    """The shortest text that is read as the same number."""
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def _line(cells: Iterable[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
