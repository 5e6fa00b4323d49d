"""benchmarks/train_step.py from start to JSON, with a model so small that its times mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SIZES = {"d_model": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16, "vocab_size": 32, "scan_unroll": 1}
TINY = [*(f"model.{name}={value}" for name, value in SIZES.items()), "train.batch_size=8", "train.seq_len=16"]


def _run(*options):
    command = [sys.executable, str(REPOSITORY / "benchmarks/train_step.py"), *TINY, *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_rates_are_those_of_the_median_step():
    done = _run("--rounds", "2", "--per-round", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    shortest, longest = found["step seconds, min and max"]
    assert 0 < shortest <= found["step seconds, median"] <= longest
    assert found["tokens per step"] == 8 * 16
    assert found["tokens per second"] * found["step seconds, median"] == pytest.approx(8 * 16)
    assert found["compile seconds"] > 0


@pytest.mark.slow
def test_compile_times_have_a_ratio():
    done = _run("--depths", "1", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ratio = found["compile seconds, 2 layers"] / found["compile seconds, 1 layers"]
    assert found["last / first"] == pytest.approx(ratio)


@pytest.mark.slow
def test_wrong_input_ends_in_one_line():
    done = _run("model.d_modle=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.d_modle=3: no such key")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_duels_with_pytorch_say_who_was_faster_and_how_both_were_set_up():
    pytest.importorskip("transformers")
    done = _run("--peer", "--duels", "2", "--turns", "2", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["tokens per step"] == 8 * 16
    assert len(found["ours, each duel"]) == len(found["peer, each duel"]) == 2
    ratios = [ours / peer for ours, peer in zip(found["ours, each duel"], found["peer, each duel"], strict=True)]
    assert found["ours / peer, each duel"] == pytest.approx(ratios)
    assert found["ours / peer"] == pytest.approx(sum(ratios) / 2)
    assert set(found["facts"]) == {"ours", "peer"}
    assert found["facts"]["ours"]["threads"] == found["facts"]["peer"]["threads"] == len(os.sched_getaffinity(0))
    assert found["facts"]["peer"]["GLIBC_TUNABLES"] == ""


@pytest.mark.slow
def test_a_contestant_that_cannot_start_ends_in_one_line():
    done = _run("--peer", "model.d_modle=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.d_modle=3: no such key")
    assert done.stderr.count("\n") == 1
