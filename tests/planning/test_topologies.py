"""Topologies by their names: the slices and nodes that exist, and what is refused."""

import pytest

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.planning.gpu_devices import GPUS
from hybridnorm_jax.planning.topologies import CHIPS, parse_topology


@pytest.mark.parametrize("kind", CHIPS)
def test_every_listed_slice_is_known_by_its_name(kind):
    sizes = []
    for shape in CHIPS[kind].shapes:
        topology = parse_topology(f"{kind}:{shape}")
        assert str(topology) == f"{kind}:{shape}"
        sizes.append(topology.size)
    assert sizes == sorted(sizes)
    assert sizes[-1] == (2048 if kind == "v5p" else 256)


def test_slices_and_nodes_multiply():
    two, nodes = parse_topology("2xv6e:16x16"), parse_topology("4xgpu:8x80GB")
    assert (two.size, two.slices, str(two)) == (512, 2, "2xv6e:16x16")
    assert (nodes.size, nodes.hbm, nodes.is_simulated, str(nodes)) == (32, 80e9, True, "4xgpu:8x80GB")


@pytest.mark.parametrize("kind", GPUS)
def test_a_gpu_gives_a_program_what_jax_takes_of_its_memory(kind, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    two = parse_topology(f"2x{kind}:8")
    assert (two.size, two.slices, two.is_gpu, two.is_simulated, str(two)) == (16, 2, True, False, f"2x{kind}:8")
    assert two.hbm == GPUS[kind].memory * 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert parse_topology(f"{kind}:1").hbm == GPUS[kind].memory * 0.92
    for wrong in ("2", "0", "half", "."):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match="must be a number above 0 and at most 1"):
            parse_topology(f"{kind}:1")


@pytest.mark.parametrize(
    ("text", "wrap"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v5e:8x16", (False, True)),
        ("v6e:8x8", (False, False)),
        ("gpu:16x80GB", (False,)),
    ],
)
def test_a_torus_closes_where_the_hardware_does(text, wrap):
    assert parse_topology(text).wrap == wrap


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p:2x4x8", "v5p has 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4,"),
        ("v5p:16x16x24", "no such slice"),
        ("v5e:16x32", "v5e has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v6e:4x2", "no such slice"),
        ("v9:2x2", "KIND one of v5e, v6e, v5p, a100, h100, h200, b200, gpu"),
        ("h100:3", "a node has 1, 2, 4 or 8 GPUs"),
        ("h100:8x80GB", "a node has 1, 2, 4 or 8 GPUs"),
        ("9999xh100:8", "at most 4,096"),
        ("0xv6e:4x4", "KIND one of"),
        ("gpu:8", "such as gpu:8x80GB"),
        ("gpu:8x0GB", "such as gpu:8x80GB"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
