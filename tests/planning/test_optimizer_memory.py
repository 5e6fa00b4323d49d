"""The bytes of each optimizer's state are those that docs/training.md lists, and what its moments add up to."""

import math
import re
from pathlib import Path

import jax
import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.training.memory import bytes_per_device
from hybridnorm_jax.training.optimizers.muon import is_muon_matrix
from hybridnorm_jax.training.program import Program

PAGE = Path(__file__).parents[2] / "docs/training.md"
ROW = re.compile(r"\| `(\w+)` \| (float32|bfloat16) \| ([\d.]+) \| ([\d.]+) \|")


def _rows():
    return [match.groups() for match in ROW.finditer(PAGE.read_text())]


def _program(name, dtype, *words):
    asked = [f"optimizer.name={name}", f"optimizer.moment_dtype={dtype}", "optimizer.schedule=constant"]
    config = parse(["1b2", *asked, "data.source=tokens", "data.files=[a.npy]", *words])
    return Program(config, make_mesh(config.mesh.sizes, jax.devices()[: math.prod(config.mesh.sizes.values())]))


def test_the_page_has_every_optimizer():
    names = {name for name, _, _, _ in _rows()}
    assert names == {"adamw", "muon", "lion", "adafactor", "schedule_free"}


@pytest.mark.parametrize(("name", "dtype", "params", "state"), _rows())
def test_bytes_per_device_of_1b2_on_eight_devices(name, dtype, params, state):
    program = _program(name, dtype, "mesh.data=1", "mesh.fsdp=8", "train.batch_size=64", "train.grad_accumulation=1")
    held = program.abstract_state
    gib = bytes_per_device(held.params) / 2**30, bytes_per_device((held.opt_state, held.average)) / 2**30
    assert (f"{gib[0]:.3f}", f"{gib[1]:.3f}") == (params, state)


def test_muons_state_is_one_number_for_matrices_and_two_for_the_others():
    program = _program("muon", "float32", "mesh.data=1", "train.batch_size=8", "train.grad_accumulation=1")
    leaves = jax.tree.leaves_with_path(program.abstract_state.params)
    numbers = sum(
        math.prod(leaf.shape) * (1 if is_muon_matrix(program.config.optimizer, path, leaf) else 2)
        for path, leaf in leaves
    )
    # And two counts, of Adam and of the schedule.
    assert bytes_per_device(program.abstract_state.opt_state) == 4 * numbers + 8
