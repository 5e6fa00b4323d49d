"""benchmarks/watch.py from start to JSON, with a model so small that its times mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_the_cost_is_that_of_a_watch_over_so_many_steps():
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16, "vocab_size": 32, "scan_unroll": 1}
    arguments = [*(f"model.{name}={value}" for name, value in sizes.items()), "train.batch_size=8", "train.seq_len=16"]
    command = [sys.executable, str(REPOSITORY / "benchmarks/watch.py"), *arguments, "--every", "50", "--rounds", "3"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["every"] == 50
    assert found["cost_quartiles"][0] <= found["cost"] <= found["cost_quartiles"][1]
    # The median of ratios is near the ratio of medians, not the same.
    assert found["cost"] == pytest.approx(found["watch_seconds"] / found["step_seconds"] / 50, rel=2)
