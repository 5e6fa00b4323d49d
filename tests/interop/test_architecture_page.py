"""The tables of architectures in README.md and docs/architectures.md are what their script writes."""

import importlib.util
from pathlib import Path

import pytest

from hybridnorm_jax.interop.architectures import ARCHITECTURES

DOCS = Path(__file__).parents[2] / "docs"


def _script():
    spec = importlib.util.spec_from_file_location("write_architecture_table", DOCS / "write_architecture_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/architectures.md"])
def test_the_table_is_up_to_date_and_has_every_architecture(page):
    script = _script()
    path = DOCS.parent / page
    assert path.read_text() == script.with_table(path, script.PAGES[path]()), "run docs/write_architecture_table.py"
    assert all(f"`{name}`" in path.read_text() for name in ARCHITECTURES)


def test_every_architecture_says_what_is_particular_about_it():
    assert all(each.summary for each in ARCHITECTURES.values())
