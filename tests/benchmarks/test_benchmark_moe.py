"""benchmarks/moe.py from start to JSON, with layers and models so small that their times mean nothing."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
KEYS = {"device", "devices", "threads", "jax", "glibc_tunables", "rounds", "layers", "step"}
MODEL = {
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 8,
    "vocab_size": 32,
    "scan_unroll": 1,
    "num_experts": 4,
    "experts_per_token": 2,
    "shared_experts": 1,
}
INPUTS = ("x", "gate", "up", "down", "weights")
TINY = [*(f"model.{name}={value}" for name, value in MODEL.items()), "train.seq_len=8"]
TOKENS = 8 * 8  # of a step


def _run(*arguments):
    # In a process of its own: the benchmark turns the compilation cache off. It has conftest.py's eight devices.
    command = [sys.executable, str(REPOSITORY / "benchmarks/moe.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _result(*arguments):
    done = _run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == KEYS
    return result


def _check_row(row, tokens, flops):
    """That every number is one, and that its rates are what `flops` in all and the seconds make them."""
    for value in ("seconds", "ratio"):
        lower, upper = row[f"{value}_quartiles"]
        assert 0 < lower <= row[value] <= upper < math.inf
    assert row["tokens_per_second"] * row["seconds"] == pytest.approx(tokens)
    assert row["flops_per_second"] * row["seconds"] == pytest.approx(flops)
    assert row["peak_fraction"] is None  # a CPU's is not known
    assert row["temporaries_mb"] > 0


@pytest.mark.slow
def test_a_layer_by_every_dispatch_of_a_cpu():
    arguments = ["--layer-only", "--shape", "48", "16", "8", "12", "3", "--shared", "1", "--skew", "--rounds", "2"]
    result = _result(*arguments, "--dispatches", "dense", "auto", "ragged", "blocked")
    assert result["step"] is None
    even, skewed = result["layers"]
    assert (even["routing"], even["empty_experts"], skewed["routing"]) == ("even", 0, "skewed")
    assert skewed["empty_experts"] >= 3  # a quarter of 12
    assert 1 < even["largest_group_over_mean"] < skewed["largest_group_over_mean"] <= 12 / 3
    for layer in result["layers"]:
        assert layer["left_out"] == {}
        assert [layer[size] for size in ("tokens", "embed", "mlp", "experts", "k", "shared")] == [48, 16, 8, 12, 3, 1]
        for mode, flops in (("forward", 2), ("forward_backward", 6)):
            assert layer[mode].keys() == {"dense", "blocked", "ragged", "feed_forward"}
            for name, row in layer[mode].items():
                router = 0 if name == "feed_forward" else 16 * 12
                _check_row(row, 48, flops * 48 * (router + 4 * 3 * 16 * 8))
                assert row["base"] == "blocked"
            assert layer[mode]["blocked"]["ratio"] == 1
            assert layer[mode]["feed_forward"]["off_by"] == {}
            assert layer[mode]["dense"]["off_by"].keys() == ({"y"} if flops == 2 else {"y", *INPUTS})
            for name in ("dense", "blocked", "ragged"):  # rounding of float32
                assert all(0 <= off < 1e-5 for off in layer[mode][name]["off_by"].values())
            assert layer[mode]["blocked"]["off_by"]["y"] > 0  # compared with the dense one, not with itself


@pytest.mark.slow
def test_bfloat16_is_compared_with_float32():
    result = _result("--layer-only", "--shape", "48", "16", "8", "6", "2", "--dtype", "bfloat16", "--rounds", "1")
    (layer,) = result["layers"]
    for name in ("dense", "blocked"):
        off = layer["forward_backward"][name]["off_by"]
        assert all(1e-4 < off[part] < 0.05 for part in ("y", "x", "gate", "up", "down"))


@pytest.mark.slow
def test_a_training_step_on_a_mesh():
    result = _result(*TINY, "--step-only", "--rounds", "2", "mesh.data=2", "mesh.fsdp=2", "mesh.expert=2")
    step = result["step"]
    assert result["layers"] == []
    assert (step["left_out"], step["tokens"]) == ({}, TOKENS)
    assert {axis: size for axis, size in step["mesh"].items() if size > 1} == {"data": 2, "fsdp": 2, "expert": 2}
    rows = step["train_step"]
    assert rows.keys() == {"blocked", "dense", "dense_model"}
    # Attention's four kernels, gate, up and down of two experts and the shared one, and the head.
    weights = 4 * 16 * 16 + 3 * 3 * 16 * 8 + 16 * 32
    attention = 12 * 16 * 8 / 2
    for name, row in rows.items():
        router = 0 if name == "dense_model" else 16 * 4
        _check_row(row, TOKENS, TOKENS * (6 * (weights + router) + attention))
        assert row["arguments_mb"] > 0
        assert row["compile_seconds"] > 0
    # Two experts of the four are not chosen.
    assert rows["blocked"]["parameters"] - rows["dense_model"]["parameters"] == 16 * 4 + 2 * 3 * 16 * 8
    assert rows["blocked"]["parameters"] == rows["dense"]["parameters"]


def test_a_dense_model_is_refused():
    done = _run("configs/benchmark.yaml", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.num_experts=0: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.num_expert=3"], "model.num_expert=3: no such key"),
        (["--dispatches", "gmm"], "model.expert_dispatch=gmm: needs platform tpu"),
        (["--dispatches", "sparse"], "model.expert_dispatch=sparse: not known"),
        (["--layer-only", "train.seq_len=8"], "train.seq_len=8: "),
        (["--shape", "48", "16", "8", "2", "3"], "--shape=48 16 8 2 3: "),
        (["mesh.data=3"], "mesh.replica=1, mesh.data=3, "),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_input_ends_in_one_line(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
