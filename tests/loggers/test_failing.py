"""No logger stops a run, or holds it for longer than the limit; one line says that the run goes on without it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig, RunSection
from hybridnorm_jax.loggers.logger import Logger
from hybridnorm_jax.loggers.logger_kinds import run_loggers
from hybridnorm_jax.training import metrics_writer
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.metrics_writer import MetricsWriter

METHODS = ("start", "write", "close")
WENT_ON = "; the run goes on without it, metrics.jsonl has every number"


def record(directory, loggers, **section):
    """Records three steps with these loggers."""
    config = RunConfig(run=RunSection(name="of a test", **section))
    with MetricsWriter(epath.Path(directory), resume_step=None, loggers=loggers, config=config) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": 1.0})
    assert len(read_records(directory)) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_logger_that_raises_is_left_out(method, tmp_path, capsys):
    class Raises(Logger):
        def write(self, step, values):
            pass

    def fail(self, *_):
        raise RuntimeError("the service says\nno")

    setattr(Raises, method, fail)
    record(tmp_path, {"Mine": Raises()})
    assert capsys.readouterr().err == f"Mine: the service says no{WENT_ON}\n"


@pytest.mark.parametrize("method", METHODS)
def test_a_logger_that_hangs_is_left_out_in_time(method, tmp_path, capsys, monkeypatch):
    over, written = threading.Event(), []

    class Hangs(Logger):
        def write(self, step, values):
            written.append(step)

    def hang(self, *_):
        over.wait(60)
        return {}

    setattr(Hangs, method, hang)
    monkeypatch.setattr(metrics_writer, "LOGGER_SECONDS", 0.3)
    began = time.monotonic()
    record(tmp_path, {"Mine": Hangs()})
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err == f"Mine: no answer within 0.3 seconds{WENT_ON}\n"
    over.set()
    time.sleep(0.2)
    # Once it answers, it gets nothing of what was waiting.
    assert written == ([1, 2, 3] if method == "close" else [])


def test_a_slow_logger_that_keeps_up_in_the_end_gets_everything(tmp_path, capsys, monkeypatch):
    written = []

    class Slow(Logger):
        def write(self, step, values):
            time.sleep(0.2)
            written.append(step)

    monkeypatch.setattr(metrics_writer, "LOGGER_SECONDS", 0.55)  # less than three times as long as one call
    config = RunConfig(run=RunSection(name="of a test"))
    with MetricsWriter(tmp_path, resume_step=None, loggers={"Slow": Slow()}, config=config) as writer:
        for step in range(1, 6):
            writer.write(step, {"train/loss": 1.0})
        time.sleep(1.0)
    assert written == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""


def test_a_table_that_cannot_be_written_is_left_out(tmp_path, capsys):
    (tmp_path / "metrics.csv").mkdir()
    record(tmp_path, run_loggers(["csv"]))
    assert capsys.readouterr().err.endswith(f"Is a directory{WENT_ON}\n")


def test_a_server_that_is_away(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record(tmp_path, run_loggers(["mlflow"]), mlflow_uri="http://127.0.0.1:9")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("MLflow: ")
    assert "127.0.0.1" in line
    assert line.endswith(WENT_ON)


def test_weights_and_biases_without_a_login_asks_nobody(tmp_path, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # it knows the environment of the first start
    directory = tmp_path / "run"
    directory.mkdir()
    record(directory, run_loggers(["wandb"]))
    login = "no login; log in with `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline"
    assert capsys.readouterr().err == f"Weights & Biases: {login}{WENT_ON}\n"
    assert [path.name for path in directory.iterdir()] == ["metrics.jsonl"]
    wandb.teardown()


FREEZE = """
import os, signal, sys
from etils import epath
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.loggers.logger_kinds import run_loggers
from hybridnorm_jax.training import metrics_writer

metrics_writer.LOGGER_SECONDS = 2.0
directory, loggers = epath.Path(sys.argv[1]), run_loggers(["wandb"])
with metrics_writer.MetricsWriter(directory, resume_step=None, loggers=loggers, config=RunConfig()) as writer:
    writer.write(1, {"train/loss": 1.0})
    writer._loggers[0]._courier.finish(within=60)
    for name in os.listdir("/proc"):
        if name.isdecimal() and os.path.exists(f"/proc/{name}/stat"):
            program, _, rest = open(f"/proc/{name}/stat").read().rpartition(")")
            if "wandb-core" in program and int(rest.split()[1]) == os.getpid():
                os.kill(int(name), signal.SIGSTOP)
                print(name)
    writer.write(2, {"train/loss": 1.0})
sys.exit(7)
"""


@pytest.mark.long
def test_a_service_of_weights_and_biases_that_hangs_does_not_hold_the_end_of_the_process(tmp_path):
    pytest.importorskip("wandb")
    command, stopped = [sys.executable, "-c", FREEZE, str(tmp_path)], []
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=dict(os.environ, WANDB_MODE="offline"))
        try:
            status = process.wait(timeout=120)
        finally:
            process.kill()
            stopped = [int(word) for word in (tmp_path / "out").read_text().split()]
            for service in stopped:
                os.kill(service, signal.SIGKILL)
    assert stopped
    assert status == 7
    assert (tmp_path / "err").read_text() == f"Weights & Biases: no answer within 2 seconds{WENT_ON}\n"
