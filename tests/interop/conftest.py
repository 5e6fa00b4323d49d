"""Models as our own PyTorch code has them, exported once for a file of tests."""

import pytest


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported model by its name, made once."""
    from exported_models import config_of, export

    made = {}

    def get(name):
        if name not in made:
            made[name] = export(tmp_path_factory.mktemp(name) / "model", config_of(name))
        return made[name]

    return get


@pytest.fixture
def model_of(exported):
    """A fresh model by its name."""
    from exported_models import in_torch

    return lambda name, **keys: in_torch(exported(name).directory, **keys)


@pytest.fixture
def fresh_compiler():
    """torch.compile without programs: it counts those of one line of code, also those of other models."""
    from exported_models import torch

    torch.compiler.reset()
