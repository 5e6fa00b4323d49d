"""What the tests of comparisons ask for: tiny models, two schemes and two seeds over random tokens."""

import numpy as np
import pytest
from small_comparisons import SMALL


@pytest.fixture
def arguments(tmp_path):
    """Two schemes and two seeds over random tokens."""
    for seed, name in enumerate(("tokens", "held")):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).integers(0, 61, 2000).astype(np.uint16))
    data = [f"data.files=[{tmp_path}/tokens.npy]", f"data.validation.held=[{tmp_path}/held.npy]"]
    run = [f"run.dir={tmp_path}", "run.name=lab", "data.source=tokens", "data.validation_fraction=0"]
    return ["schemes=[pre,post]", "seeds=[0,1]", "learning_rates=[1.0e-3]", *SMALL, *data, *run]
