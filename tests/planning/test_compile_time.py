"""Compiling a train step for TPUs does not take longer with more layers of the same placement."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Seconds of processor time, so that other work on the machine does not count; shallow and deep in turns.
PROGRAM = """
import statistics, time
from hybridnorm_jax.planning.compilation import plan, read_config
from hybridnorm_jax.planning.topologies import parse_topology

def seconds(layers):
    keys = ["train.batch_size=8", "train.seq_len=512", "model.dtype=bfloat16", "mesh.data=1", "mesh.fsdp=-1"]
    config = read_config(["151m", f"model.num_layers={layers}", "train.grad_accumulation=1", *keys])
    start = time.process_time()
    plan(config, parse_topology("v5e:2x2"))
    return time.process_time() - start

seconds(12)  # starts the compiler
pairs = [(seconds(12), seconds(96)) for _ in range(3)]
print(*(statistics.median(column) for column in zip(*pairs)))
"""


@pytest.mark.slow
def test_96_layers_compile_as_fast_as_12():
    pytest.importorskip("libtpu")
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    line = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shallow, deep = map(float, done.stdout.split()[-2:])
    assert deep <= 1.1 * shallow
