"""The picture of the layers shows the import contract as it is."""

import importlib.util

from pages import REPOSITORY

PICTURES = REPOSITORY / "docs" / "pictures"


def test_the_picture_of_the_layers_is_that_of_the_contract():
    spec = importlib.util.spec_from_file_location("layers", PICTURES / "layers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (PICTURES / "layers.svg").read_text() == module.drawing(), "run: python docs/pictures/layers.py"
