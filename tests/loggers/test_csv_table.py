"""metrics.csv: its columns grow, and it holds the same numbers as metrics.jsonl."""

import csv
import random

from etils import epath
from loggers import stores

from hybridnorm_jax.loggers import csv_table
from hybridnorm_jax.loggers.csv_table import CsvTable
from hybridnorm_jax.loggers.logger import FINISHED, LoggedRun


def started(directory, **run):
    table = CsvTable()
    table.start(LoggedRun(epath.Path(directory), **run))
    return table


def test_a_row_is_in_the_file_at_once_and_a_new_name_becomes_a_column(tmp_path):
    table = started(tmp_path)
    file = tmp_path / "metrics.csv"
    assert file.read_text() == "step\n"
    table.write(10, {"train/loss": 2.5})
    assert file.read_text() == "step,train/loss\n10,2.5\n"
    table.write(20, {"train/loss": 0.1, "tokens_per_second": 1000.0})
    table.write(20, {'eval/a, "b"/loss': 3e-9})
    expected = 'step,train/loss,tokens_per_second,"eval/a, ""b""/loss"\n10,2.5,,\n20,0.1,1000,3e-09\n'
    assert file.read_text() == expected
    table.close(FINISHED)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv"}


def test_numbers_are_read_as_they_were(tmp_path):
    draw = random.Random(0)
    numbers = [draw.uniform(-1, 1) * 10 ** draw.randint(-300, 300) for _ in range(200)] + [0.0, 1e16, 2.0**60]
    table = started(tmp_path)
    for step, number in enumerate(numbers, 1):
        table.write(step, {"x": number})
    table.close(FINISHED)
    assert [values[0] for values in stores.csv_table(tmp_path)["x"].values()] == numbers


def test_in_a_bucket_the_whole_table_is_uploaded_rarely_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_table, "is_local", lambda path: False)
    table = started(tmp_path)
    for step in range(1, 1001):
        table.write(step, {"train/loss": 1.0 / step})
    assert not (tmp_path / "metrics.csv").exists()
    table._next = 0.0  # a minute later
    table.write(1001, {"train/loss": 0.5})
    with open(tmp_path / "metrics.csv") as file:
        assert len(list(csv.reader(file))) == 1002
    table.write(1002, {"train/loss": 0.5})
    table.close(FINISHED)
    with open(tmp_path / "metrics.csv") as file:
        assert len(list(csv.reader(file))) == 1003
