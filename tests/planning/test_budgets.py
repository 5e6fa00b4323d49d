"""What five small train steps cost on TPUs, held to 3 % of budgets.json.

A change that costs more fails. One that costs less fails too, so that nothing is lost again: write the new numbers with

    python tests/planning/test_budgets.py

and say in the commit why they changed. They hold for one version of libtpu.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
FILE = Path(__file__).with_name("budgets.json")
TOLERANCE = 0.03
# Dense with everything replicated, dense with everything sharded, in chunks of the loss and whole, by XLA and by our
# kernels, and experts: all in bfloat16, with splash attention.
RUNS = {
    "151m on v5e:2x2": ["151m", "model.num_layers=2", "train.batch_size=16", "train.grad_accumulation=1"],
    "1b2 on v5e:2x2": ["1b2", "model.num_layers=2", "train.batch_size=16", "model.scheme=pre"],
    "1b2 with whole logits on v5e:2x2": [
        *["1b2", "model.num_layers=2", "train.batch_size=4", "model.scheme=pre", "train.loss_chunk=null"]
    ],
    "1b2 with the kernels of the loss on v5e:2x2": [
        *["1b2", "model.num_layers=2", "train.batch_size=4", "model.scheme=pre", "train.loss_chunk=null"],
        "train.loss_kernel=pallas",
    ],
    "moe_quickstart on v6e:2x2": ["moe_quickstart", "model.num_layers=2", "model.dtype=bfloat16", "mesh.expert=4"],
}


def measured(name: str) -> dict[str, float]:
    """What `hybridnorm plan` counts for one of RUNS."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    topology = name.rpartition(" ")[2]
    line = [sys.executable, "-m", "hybridnorm_jax", "plan", *RUNS[name], "--topology", topology, "--json"]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    counts = found["counts_per_step_and_device"]
    assert (counts["unknown_kernels"], counts["unknown_loops"]) == ([], [])
    return {
        "flops": sum(counts["product_flops"].values()) + sum(counts["kernel_flops"].values()),
        "memory_bytes": sum(counts["memory_bytes"].values()),
        "peak_bytes": found["memory_per_device"]["peak"],
        "sent_bytes": counts["sent_inside"] + counts["sent_between"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_step_costs_what_it_did(name):
    pytest.importorskip("libtpu")
    budgets = json.loads(FILE.read_text())
    installed = importlib.metadata.version("libtpu")
    if budgets["libtpu"] != installed:
        pytest.skip(f"the budgets are of libtpu {budgets['libtpu']}, and {installed} is installed")
    assert measured(name) == pytest.approx(budgets["steps"][name], rel=TOLERANCE)


def test_every_step_has_a_budget():
    budgets = json.loads(FILE.read_text())["steps"]
    assert set(budgets) == set(RUNS)
    assert all(number > 0 for budget in budgets.values() for number in budget.values())


if __name__ == "__main__":
    assert importlib.util.find_spec("libtpu"), "needs libtpu"
    steps = {name: measured(name) for name in RUNS}
    FILE.write_text(json.dumps({"libtpu": importlib.metadata.version("libtpu"), "steps": steps}, indent=2) + "\n")
