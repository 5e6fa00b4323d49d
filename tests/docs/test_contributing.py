"""The worked example of CONTRIBUTING.md, carried out: a scheme, its table, its equations in words and in numbers."""

import importlib.util
import inspect

import pytest
from pages import REPOSITORY, blocks

import hybridnorm_jax as hn

NAME = "sandwich_attention"
TESTS = REPOSITORY / "tests" / "model"


def _load(file):
    """A test file as a module of its own, so that its tables can be changed."""
    spec = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _entry(table):
    """The block of the page that adds an entry to this table of a test file."""
    page = REPOSITORY / "CONTRIBUTING.md"
    (found,) = [block for block in blocks(page) if block.text.startswith(f'{table}["{NAME}"]')]
    return found.text


@pytest.mark.usefixtures("example_scheme")
def test_the_equations_in_words():
    tests = _load(TESTS / "test_placement.py")
    assert NAME not in tests.PAPER
    exec(_entry("PAPER"), vars(tests))
    tests.test_equations(NAME)
    tests.test_the_table_is_complete()


@pytest.mark.usefixtures("example_scheme")
def test_the_equations_in_numbers(small_config, random_params):
    tests = _load(TESTS / "test_block.py")
    exec(_entry("EQUATIONS"), vars(tests))
    tests.test_a_block_is_its_papers_equation(NAME, small_config, random_params)


@pytest.mark.usefixtures("example_scheme")
def test_the_example_has_the_types_that_mypy_wants():
    written, expected = (inspect.get_annotations(hn.SCHEMES[name].block) for name in (NAME, "pre"))
    assert written == expected


def test_the_example_is_not_in_the_table_already():
    assert NAME not in hn.SCHEMES
