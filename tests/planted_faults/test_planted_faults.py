"""The suite notices wrong numbers: each fault of faults.py, planted in a copy of the package, makes a test fail."""

from pathlib import Path

import pytest
from planted_faults.faults import FAULTS
from planted_faults.planting import REPOSITORY, first_failure, plant, with_fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_can_still_be_planted(fault):
    source = (REPOSITORY / "hybridnorm_jax" / fault.file).read_text()
    assert with_fault(fault, source) != source
    for name in fault.tests:
        file, _, test = name.partition("::")
        assert f"def {test}" in (REPOSITORY / "tests" / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_test_fails_where_the_fault_is_planted(fault, tmp_path: Path):
    plant(fault, tmp_path)
    assert first_failure(fault, tmp_path) is not None
