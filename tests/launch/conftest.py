"""Commands in the place of those of a cluster."""

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path)
