"""benchmarks/generation.py from start to JSON, with a model so small that its times mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SMALL = ["quickstart", "model.num_layers=1", "model.d_model=32", "model.num_heads=2", "model.mlp_dim=16"]


def test_tokens_a_second_are_counted():
    options = ["--batch", "1", "2", "--prompt", "3", "--new", "5", "--rounds", "2", "--json"]
    command = [sys.executable, str(REPOSITORY / "benchmarks/generation.py"), *SMALL, *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["batch"], row["ours"]["tokens"]) for row in rows] == [(1, 5), (2, 10)]
    for row in rows:
        lower, upper = row["ours"]["tokens_per_second_quartiles"]
        assert 0 < lower <= row["ours"]["tokens_per_second"] <= upper
        assert upper <= row["ours"]["tokens_per_second_best"] + 0.1
