"""A run in MLflow: in a tracking server, a database or a folder."""

import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hybridnorm_jax.loggers.logger import FAILED, FINISHED, STOPPED, LoggedRun, Logger
from hybridnorm_jax.whole_files import expanded, is_local, write_whole

ID_FILE = "mlflow_id"
DATABASE, SQLITE = "mlflow.db", "sqlite:///"
STATUSES = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}
# What a request may hold, and the longest value of a parameter and the longest name of a metric (MLflow's limits).
MOST_METRICS, MOST_PARAMETERS, LONGEST_PARAMETER, LONGEST_NAME = 1000, 100, 6000, 250
# A server is asked again after 2, 4, 8 and 16 seconds; MLflow's own default goes on for minutes.
RETRIES = "4"


class MlflowRun(Logger):
    """Logs to one run of MLflow, whose id <run>/mlflow_id ties to the run directory.

    The project is MLflow's experiment. Nothing can be taken back there. So it is asked, when a run goes on, of which
    steps it has values: a step that is made again after a kill, with the same numbers, is not logged again.
    """

    def start(self, run: LoggedRun) -> Mapping[str, int]:
        """Begin a run there, or go on with it."""
        uri = tracking_uri(run)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
            # A folder was asked for, so MLflow need not be told once more that one is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # they would write dozens of lines between ours
            logging.getLogger(name).setLevel(logging.WARNING)
        if uri.startswith(SQLITE):
            _make_database(uri.removeprefix(SQLITE).partition("?")[0])
        self._client = MlflowClient(tracking_uri=uri)
        id_file = run.directory / ID_FILE
        if run.resume_step is not None and id_file.exists():
            self._id = id_file.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            found = self._client.get_run(self._id)
            self._show(uri, found.info.experiment_id)
            # Only this form of what it answers has the steps.
            steps = {metric.key: metric.step for metric in found.data.to_proto().metrics}
            return {name: steps[key] for name in _names(run) if (key := metric_name(name)) in steps}
        experiment = self._experiment(run.project)
        tags = dict.fromkeys(run.tags, "true") | ({"group": run.group} if run.group else {})
        self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        write_whole(id_file, self._id)
        self._show(uri, experiment)
        self._log_parameters(run.config)
        return {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(metric_name(name), value, now, step) for name, value in values.items()]
        for some in _batches(metrics, MOST_METRICS):
            self._client.log_batch(self._id, metrics=some)

    def close(self, how: str) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._id, status=STATUSES[how])

    def _show(self, uri: str, experiment: str) -> None:
        if uri.startswith("http"):
            self.url = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._id}"

    def _experiment(self, name: str) -> str:
        """The id of the experiment of this name, which another run may make in the same moment."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _log_parameters(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [Param(name, str(value)[:LONGEST_PARAMETER]) for name, value in _leaves(config)]
        for some in _batches(parameters, MOST_PARAMETERS):
            self._client.log_batch(self._id, params=some)


def tracking_uri(run: LoggedRun) -> str:
    """Where MLflow keeps the run: run.mlflow_uri, or MLFLOW_TRACKING_URI, or a database beside the run directories.

    Raises:
      ValueError: neither is set, and the run is in a bucket, where no database can be.
    """
    uri = run.config.get("run", {}).get("mlflow_uri") or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return expanded(uri)
    if not is_local(run.directory):
        raise ValueError("run.mlflow_uri must be set for a run in a bucket")
    return f"{SQLITE}{os.path.abspath(run.directory.parent / DATABASE)}"


def _make_database(file: str) -> None:
    """Make a database with MLflow's tables, whole or not at all.

    MLflow makes them one after another for seconds, and cannot use what a process leaves that is killed meanwhile.
    """
    if os.path.exists(file):
        return
    from mlflow.tracking import MlflowClient

    partial = f"{file}.{secrets.token_hex(4)}.partial"
    try:
        MlflowClient(tracking_uri=f"{SQLITE}{partial}")
        with contextlib.suppress(FileExistsError):  # another run was faster
            os.link(partial, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def metric_name(name: str) -> str:
    """The name as MLflow allows it: letters, digits and `_-.: /`, and no part that is empty or dots."""
    parts = (re.sub(r"[^\w.\-: ]", "_", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else "_" for part in parts)[:LONGEST_NAME]


def _names(run: LoggedRun) -> Iterable[str]:
    """All names that the run ever had a value of."""
    return {**run.recorded, **run.last_steps}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield metric_name(f"{prefix}{name}"), value


def _batches(items: list, size: int) -> Iterator[list]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
