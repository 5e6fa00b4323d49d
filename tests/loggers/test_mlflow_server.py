"""A real tracking server of MLflow: what a run shows there, and that a server that goes away stops nothing."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from etils import epath
from loggers import stores
from processes import free_port

from hybridnorm_jax.config.run_config import RunConfig, RunSection
from hybridnorm_jax.errors import REQUEUE, RunStopped
from hybridnorm_jax.loggers import mlflow_run
from hybridnorm_jax.loggers.logger_kinds import run_loggers
from hybridnorm_jax.loggers.mlflow_run import metric_name
from hybridnorm_jax.training.metrics_writer import MetricsWriter

pytest.importorskip("mlflow")
# mlflow-skinny, which suffices for a run, brings no server.
server_only = pytest.mark.skipif(
    not Path(sys.executable).with_name("mlflow").exists(), reason="needs the package mlflow"
)


@pytest.fixture
def server(tmp_path):
    """(its address, a function that ends it)."""
    pytest.importorskip("flask")
    port = free_port()
    command = [Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=dict(os.environ, MLFLOW_DISABLE_TELEMETRY="true"),
            start_new_session=True,
        )

    def end():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/health", process)
        yield address, end
    finally:
        end()


def _wait_for(address, process):
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not start")


@pytest.mark.long
@server_only
def test_a_run_is_shown_by_a_server_and_goes_on_when_it_goes_away(server, tmp_path, capsys, monkeypatch):
    from mlflow.tracking import MlflowClient

    address, end = server
    config = RunConfig(run=RunSection(name="mine", project="p", group="g", tags=("t",), mlflow_uri=address))
    run = epath.Path(tmp_path / "run")
    run.mkdir()

    def writer(resume_step):
        return MetricsWriter(run, resume_step=resume_step, loggers=run_loggers(["mlflow"]), config=config)

    first = writer(None)
    first.write(1, {"train/loss": 1.0})
    first.write(2, {"train/loss": 2.0})
    first.__exit__(RunStopped, RunStopped(REQUEUE, "told to"), None)
    client, name = MlflowClient(tracking_uri=address), (run / "mlflow_id").read_text()
    found = client.get_run(name)
    assert (found.info.run_name, found.info.status) == ("mine", "KILLED")
    assert found.data.tags["group"] == "g"
    assert found.data.tags["t"] == "true"
    assert found.data.params["train.steps"] == "1000"
    assert f"MLflow: {address}/#/experiments/" in capsys.readouterr().out

    with writer(1) as second:
        second.write(2, {"train/loss": 2.0})
        second.write(3, {"train/loss": 3.0})
    assert stores.mlflow(run, address, ["train/loss"]) == {"train/loss": {1: [1.0], 2: [2.0], 3: [3.0]}}
    assert client.get_run(name).info.status == "FINISHED"

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with writer(3) as third:
        third.write(4, {"train/loss": 4.0})
        end()
        third.write(5, {"train/loss": 5.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("MLflow: ")
    assert line.endswith("the run goes on without it, metrics.jsonl has every number")


def test_a_database_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    """MLflow cannot use the tables that a process leaves which is killed while it makes them."""
    file, made = tmp_path / "mlflow.db", []

    def client(tracking_uri):
        made.append(tracking_uri)
        assert not file.exists()
        Path(tracking_uri.removeprefix("sqlite:///")).write_text("tables")
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("mlflow.tracking.MlflowClient", client)
    with pytest.raises(KeyboardInterrupt):
        mlflow_run._make_database(str(file))
    assert list(tmp_path.iterdir()) == []
    mlflow_run._make_database(str(file))
    mlflow_run._make_database(str(file))
    assert (len(made), list(tmp_path.iterdir())) == (2, [file])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("eval/held out/loss", "eval/held out/loss"),
        ("eval/a+b(c)/loss", "eval/a_b_c_/loss"),
        ("eval/../loss", "eval/_/loss"),
        ("eval//loss", "eval/_/loss"),
        ("watch/ä.b:c-d/000", "watch/ä.b:c-d/000"),
    ],
)
def test_names_are_made_such_that_mlflow_takes_them(name, allowed):
    from mlflow.utils.validation import _validate_metric_name

    assert metric_name(name) == allowed
    _validate_metric_name(metric_name(name))
