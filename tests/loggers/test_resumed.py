"""Every logger shows each value of a run once, whatever happens to the run between."""

import contextlib
import json

import pytest
from etils import epath
from loggers import stores

from hybridnorm_jax.config.run_config import RunConfig, RunSection
from hybridnorm_jax.loggers.logger_kinds import run_loggers
from hybridnorm_jax.training.metrics_file import read_records, single_values
from hybridnorm_jax.training.metrics_writer import MetricsWriter

LOSS, EVALUATION = "train/loss", "eval/held/loss"
NAMES = (LOSS, EVALUATION)
# Its tables take seconds to make.
DATABASE = pytest.param("mlflow in a database", marks=pytest.mark.long)


class Store:
    """A kind of logger, and how to read what it wrote; `keeps_first`: of a step that was made twice."""

    def __init__(self, name, read, *, keeps_first, uri=""):
        self.name, self.read, self.keeps_first = name, read, keeps_first
        section = RunSection(name="of a test", project="tests", group="some", tags=("tried",), mlflow_uri=uri)
        self.config = RunConfig(run=section)

    @contextlib.contextmanager
    def writer(self, directory, resume_step):
        loggers = run_loggers([self.name])
        with MetricsWriter(directory, resume_step=resume_step, loggers=loggers, config=self.config) as writer:
            yield writer


@pytest.fixture(params=["tensorboard", "csv", "mlflow in a folder", DATABASE, "wandb"])
def store(request, tmp_path, monkeypatch):
    if request.param == "tensorboard":
        return Store("tensorboard", stores.tensorboard, keeps_first=False)
    if request.param == "csv":
        return Store("csv", stores.csv_table, keeps_first=False)
    if request.param == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        return Store("wandb", stores.wandb_offline, keeps_first=True)
    pytest.importorskip("mlflow")
    uri = f"{tmp_path}/mlruns" if "folder" in request.param else f"sqlite:///{tmp_path}/mlflow.db"
    return Store("mlflow", lambda run: stores.mlflow(run, uri, NAMES), keeps_first=True, uri=uri)


def recorded(directory):
    found = {}
    for record in read_records(directory):
        for name, value in single_values(record).items():
            found.setdefault(name, {}).setdefault(record["step"], []).append(value)
    return found


def test_each_value_is_shown_once_after_a_kill_and_after_a_new_beginning(store, tmp_path, capsys):
    run = epath.Path(tmp_path / "run")
    run.mkdir()
    with store.writer(run, None) as writer:
        for step in (1, 2, 3, 4, 5, 6):
            writer.write(step, {LOSS: float(step)})
            if step == 2:
                writer.write(step, {EVALUATION: 2.5})
    # A killed process may have recorded what it had not handed to its loggers yet.
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, LOSS: 7.0}) + "\n")

    # Step 4 was saved and its evaluation was not made; steps 5 and 6 are made again.
    with store.writer(run, 4) as writer:
        writer.write(4, {EVALUATION: 4.5})
        for step in (5, 6, 8):
            writer.write(step, {LOSS: 10.0 * step})
    found = store.read(run)
    again = [5.0, 6.0] if store.keeps_first else [50.0, 60.0]
    assert found[LOSS] == {1: [1.0], 2: [2.0], 3: [3.0], 4: [4.0], 5: again[:1], 6: again[1:], 8: [80.0]}
    assert found[EVALUATION] == {2: [2.5], 4: [4.5]}
    if not store.keeps_first:
        assert found == recorded(run)

    with store.writer(run, None) as writer:  # its checkpoints are gone
        writer.write(1, {LOSS: 0.5})
    assert store.read(run)[LOSS] == {1: [0.5]}
    assert "goes on without it" not in capsys.readouterr().err


def test_a_logger_that_is_added_later_gets_what_was_recorded_before(store, tmp_path, capsys):
    with MetricsWriter(tmp_path, resume_step=None, loggers={}, config=store.config) as writer:
        writer.write(1, {LOSS: 1.0})
        writer.write(2, {LOSS: 2.0})
        writer.write(3, {LOSS: 3.0})
    run = epath.Path(tmp_path)
    with store.writer(run, 2) as writer:
        writer.write(3, {LOSS: 30.0})
    assert store.read(run)[LOSS] == {1: [1.0], 2: [2.0], 3: [30.0]}
    assert capsys.readouterr().err == ""
