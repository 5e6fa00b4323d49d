"""docs/using_a_model.md: its table of schemes is what its script writes, and its example is the model card's."""

import functools
import importlib.util
import re
from pathlib import Path

import hybridnorm_jax as hn
from hybridnorm_jax.commands.decoder_card import WITH_TOKENIZER
from hybridnorm_jax.interop.architectures import ARCHITECTURES

DOCS = Path(__file__).parents[2] / "docs"


@functools.cache
def _script():
    spec = importlib.util.spec_from_file_location("write_export_table", DOCS / "write_export_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.table = functools.cache(module.table)  # it tries every scheme with every kind of model
    return module


def test_the_table_is_up_to_date():
    script = _script()
    assert script.PAGE.read_text() == script.page(), "run: python docs/write_export_table.py"


def test_the_table_has_every_scheme_and_classes_that_exist():
    table = _script().table()
    assert all(f"`{scheme}`" in table for scheme in hn.SCHEMES)
    found = set(re.findall(r"`(\w+(?:ForCausalLM|LMHeadModel))`", table))
    assert found
    assert found <= {each.class_name for each in ARCHITECTURES.values()}


def test_the_example_is_that_of_the_model_cards():
    page = (DOCS / "using_a_model.md").read_text()
    for line in WITH_TOKENIZER.splitlines():
        if line.startswith("print("):
            assert line in page
