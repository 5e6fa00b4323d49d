"""What loggers have written, read back: name -> step -> the values that people see, in the order of writing."""

import collections
import csv
import struct
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog

# Of wandb's files: their header, the size of a block, and the kinds of a piece of a record.
WANDB_HEADER, WANDB_BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def tensorboard(directory):
    """The event files as TensorBoard reads them: a new session hides what was there of its first step and later."""
    found = collections.defaultdict(dict)
    for path in sorted((directory / "tensorboard").iterdir()):
        for content in _event_records(path.read_bytes()):
            event = Event.FromString(content)
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {
                    name: {step: values for step, values in steps.items() if step < event.step}
                    for name, steps in found.items()
                }
                found = collections.defaultdict(dict, found)
            for value in event.summary.value:
                found[value.tag].setdefault(event.step, []).append(value.simple_value)
    return dict(found)


def _event_records(data):
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += length + 16


def csv_table(directory):
    """metrics.csv."""
    found = collections.defaultdict(dict)
    with open(directory / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, text in row.items():
                if text:
                    found[name].setdefault(step, []).append(float(text))
    return dict(found)


def mlflow(directory, uri, names):
    """The run of MLflow that the run directory names."""
    from mlflow.tracking import MlflowClient

    client, run = MlflowClient(tracking_uri=uri), (directory / "mlflow_id").read_text()
    found = collections.defaultdict(dict)
    for name in names:
        for metric in client.get_metric_history(run, name):
            found[name].setdefault(metric.step, []).append(metric.value)
    return dict(found)


def wandb_offline(directory):
    """All offline files of the run of Weights & Biases that the run directory names, as `wandb sync` sends them."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    found = collections.defaultdict(dict)
    run = (directory / "wandb_id").read_text()
    for path in sorted((directory / "wandb").glob(f"offline-run-*/run-{run}.wandb")):
        for record in _ended(path, Record):
            if record.WhichOneof("record_type") != "history":
                continue
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if name != "step" and not name.startswith("_"):
                    found[name].setdefault(items["step"], []).append(value)
    return dict(found)


def _ended(path, kind):
    """The records of a file, once its end is there: wandb's service writes it a moment after the run has finished."""
    until = time.monotonic() + 60
    while True:
        records = [kind.FromString(content) for content in _wandb_records(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < until, f"{path} is not complete"
        time.sleep(0.1)


def _wandb_records(data):
    """The records of a file in LevelDB's log format, behind wandb's header."""
    at, begun = WANDB_HEADER, b""
    while at < len(data):
        left = WANDB_BLOCK - at % WANDB_BLOCK
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return  # it is being written
        begun = (b"" if kind in (FULL, FIRST) else begun) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield begun
