"""metrics.jsonl survives kills and resumes; FLOPs agree with counts made by hand and with the real parameters."""

import json
import math
import struct
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from tensorboardX.proto.event_pb2 import Event

import hybridnorm_jax as hn
from hybridnorm_jax.errors import MissingExtraError, UserError
from hybridnorm_jax.training.metrics_writer import MetricsWriter, WandbRun
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token, peak_flops


def open_writer(run_dir, *, resume_step=None, wandb=False, enabled=True):
    shown = WandbRun("project", "name", {"train": {"steps": 3}}) if wandb else None
    return MetricsWriter(run_dir, resume_step=resume_step, wandb=shown, enabled=enabled)


def entries(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensorboard_events(run_dir):
    """Every event in the event files: records of length, its checksum, content, its checksum."""
    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(10, {"train/loss": 2.5, "mfu": None})
    assert entries(tmp_path) == [{"step": 10, "train/loss": 2.5, "mfu": None}]
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 10,')
    writer.close()


def test_values_that_json_does_not_have_become_null(tmp_path):
    writer = open_writer(tmp_path)
    values = {"nan": math.nan, "inf": -math.inf, "device": jax.numpy.float32(1.5), "numpy": np.float32(0.5)}
    writer.write(1, values)
    writer.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 1, "nan": None, "inf": None, "device": 1.5, "numpy": 0.5}
    assert json.loads(line, parse_constant=refuse) == expected


def test_tensorboard_gets_what_is_not_null(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(4, {"train/loss": 2.0, "mfu": None, "bad": math.nan})
    writer.close()
    found = [
        (value.tag, event.step, value.simple_value)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    ]
    assert found == [("train/loss", 4, 2.0)]


def test_tensorboard_gets_the_values_of_each_layer(tmp_path):
    writer = open_writer(tmp_path)
    layers = {"watch/rms": np.array([1.0, math.nan, 3.0]), "watch/head": np.array(2.0)}
    writer.write(1, layers, by_layer=True)
    writer.write(2, {"train/losses": np.array([4.0, 5.0])})
    writer.close()
    found = {value.tag: value.simple_value for event in tensorboard_events(tmp_path) for value in event.summary.value}
    assert found == {"watch/rms/000": 1, "watch/rms/002": 3, "watch/head": 2}
    assert entries(tmp_path)[0] == {"step": 1, "watch/rms": [1, None, 3], "watch/head": 2}


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    writer = open_writer(tmp_path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    writer = open_writer(tmp_path, resume_step=2)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]
    writer.write(3, {"train/loss": 30.0})
    writer.close()
    assert [entry["train/loss"] for entry in entries(tmp_path)] == [1.0, 2.0, 30.0]
    # TensorBoard hides what earlier event files hold of these steps and later ones.
    assert sorted(event.step for event in tensorboard_events(tmp_path) if event.HasField("session_log")) == [0, 3]


def test_starting_anew_drops_everything(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    open_writer(tmp_path).close()
    assert entries(tmp_path) == []


def test_a_resume_that_is_killed_while_dropping_lines_loses_nothing(tmp_path, monkeypatch):
    writer = open_writer(tmp_path)
    for step in (1, 2):
        writer.write(step, {"train/loss": float(step)})
    writer.close()

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.write_text", full)
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: .*No space left"):
        open_writer(tmp_path, resume_step=1)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]


def test_other_processes_write_nothing(tmp_path):
    writer = open_writer(tmp_path, wandb=True, enabled=False)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_has_every_line_too(monkeypatch):
    monkeypatch.setitem(_registry, "gcs", InMemory)
    monkeypatch.setattr("hybridnorm_jax.training.metrics_writer.SummaryWriter", lambda *args, **keys: NoTensorBoard())
    run_dir = epath.Path("gs://bucket/runs/name")
    run_dir.mkdir(parents=True)
    writer = open_writer(run_dir)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": float(step)})
    assert [entry["step"] for entry in entries(run_dir)] == [1, 2, 3]
    writer = open_writer(run_dir, resume_step=2)
    writer.write(3, {"train/loss": 0.0})
    assert [entry["train/loss"] for entry in entries(run_dir)] == [1.0, 2.0, 0.0]


class InMemory(MemoryFileSystem):
    protocol = ("gs", "gcs")


class NoTensorBoard:
    def add_scalar(self, *args):
        pass


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"run.wandb=true: .*pip install 'hybridnorm-jax\[wandb\]'"):
        open_writer(tmp_path, wandb=True)


def test_wandb_gets_the_step_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    logged, started = [], []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: None, define_metric=lambda *args, **keys: None)
    fake = types.ModuleType("wandb")
    fake.init = lambda **keys: started.append(keys) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (None, 5, None):
        writer = open_writer(tmp_path, resume_step=resume_step, wandb=True)
        writer.write(7, {"train/loss": 1.0, "mfu": None})
        writer.close()
    assert logged == 3 * [{"step": 7, "train/loss": 1.0}]
    first, resumed, anew = (keys["id"] for keys in started)
    assert first == resumed != anew
    assert started[0]["project"] == "project"
    assert started[0]["config"] == {"train": {"steps": 3}}


TINY = {"d_model": 8, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16, "vocab_size": 10}


def test_flops_counted_by_hand():
    # A layer: q 8*8, k and v 8*4 each, out 8*8, three matrices of 8*16: 64 + 32 + 32 + 64 + 384 = 576. Head: 8*10.
    # Attention: forward 2 (scores) + 2 (values) products of 2*4*6 multiply-adds' FLOPs, 3 of forward and backward,
    # half of it masked: 3 layers * 12 * 8 * 6 / 2 = 864.
    swiglu = hn.ModelConfig(**TINY, activation="swiglu")
    assert model_flops_per_token(swiglu, seq_len=6) == 6 * (3 * 576 + 80) + 864 == 11712
    gelu = hn.ModelConfig(**TINY, activation="gelu")
    assert model_flops_per_token(gelu, seq_len=6) == 6 * (3 * (576 - 128) + 80) + 864


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_flops_follow_the_decoders_own_matrices(activation):
    config = hn.ModelConfig(**TINY, activation=activation, attention_bias=True, mlp_bias=True, head_dim=6)
    shapes = jax.eval_shape(hn.Decoder(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    weights = sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
    assert model_flops_per_token(config, seq_len=0) == 6 * weights


def test_a_tied_head_costs_as_much():
    flops = {tied: model_flops_per_token(hn.ModelConfig(**TINY, tie_embeddings=tied), 6) for tied in (False, True)}
    assert flops[True] == flops[False]


def test_mfu_of_known_and_unknown_devices():
    # 1e6 tokens/s of 1e9 FLOPs = 1e15 FLOP/s on two H100s of 989e12.
    assert mfu(1e6, 1e9, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(1e15 / 1978e12)
    assert mfu(1e6, 1e9, "cpu", 8) is None
    assert mfu(1e6, 1e9, jax.devices("cpu")[0].device_kind, 8) is None


def test_device_kinds_are_matched_whole():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") is None
