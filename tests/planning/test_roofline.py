"""Rooflines by data sheets, and that the data sheets are of the same devices as everything else."""

import pytest

from hybridnorm_jax.planning import plan_table
from hybridnorm_jax.planning.gpu_devices import GPUS
from hybridnorm_jax.planning.roofline import DATA_SHEETS, Work, roofline
from hybridnorm_jax.planning.topologies import CHIPS
from hybridnorm_jax.training.throughput import peak_flops


def test_the_longest_binds():
    sheet = DATA_SHEETS["v6e"]
    work = Work(flops=918e12, memory=3 * 1638e9, inside=2 * 400e9, between=12.5e9)
    found = roofline(work, sheet)
    assert found.seconds == {"arithmetic": 1, "HBM": 3, "ICI": 2, "DCN": 1}
    assert (found.bound, found.least_seconds) == ("HBM", 3)


def test_a_step_of_the_large_model_takes_as_long_as_its_products():
    """582.7 TFLOP, what 16 x 4096 tokens of the 1.2B model take, are 0.635 s of a v6e."""
    assert roofline(Work(582.7e12, 0, 0, 0), DATA_SHEETS["v6e"]).least_seconds == pytest.approx(0.635, rel=1e-3)


def test_every_topology_has_a_data_sheet():
    assert set(DATA_SHEETS) == {*CHIPS, *GPUS}
    for kind, gpu in GPUS.items():
        assert DATA_SHEETS[kind].flops == peak_flops(gpu.name)
        # The driver's clock gives a few percent less than the data sheet, or as much.
        assert gpu.bandwidth == pytest.approx(DATA_SHEETS[kind].memory, rel=0.05)


@pytest.mark.parametrize(
    ("number", "cell"), [(None, "-"), (0.02671, "0.0267"), (14.27, "14.3"), (999.4, "999"), (1257.0, "1,260")]
)
def test_cells_of_the_table_have_three_digits(number, cell):
    assert plan_table._digits(number) == cell
