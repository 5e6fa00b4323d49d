"""docs/parameters.md is what its script writes, and has every leaf that a scheme can ask for."""

import importlib.util
import runpy
from pathlib import Path

import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.model.placement import HEAD_NORMS

DOCS = Path(__file__).parents[2] / "docs"
EXTENT = {"q_norm": "heads * head_dim", "context_norm": "heads * head_dim"}
EXTENT |= dict.fromkeys(("k_norm", "v_norm"), "kv_heads * head_dim")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("write_parameters", DOCS / "write_parameters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script):
    assert script.PAGE.read_text() == script.page(), "run: python docs/write_parameters.py"


def test_the_script_writes_where_it_stands(tmp_path):
    copy = tmp_path / "write_parameters.py"
    copy.write_text((DOCS / "write_parameters.py").read_text())
    runpy.run_path(str(copy), run_name="__main__")
    assert (tmp_path / "parameters.md").read_text() == (DOCS / "parameters.md").read_text()


@pytest.mark.parametrize("name", hn.SCHEMES)
def test_every_norm_of_a_scheme_is_on_the_page(name):
    page = (DOCS / "parameters.md").read_text()
    for placement in hn.SCHEMES[name].placements(5):
        for sublayer in ("attention", "feed_forward"):
            parts = getattr(placement, sublayer)
            found = [which for which in ("pre", "branch", "post", "entry") if getattr(parts, which)]
            found += ["side"] if parts.side == "read" else []
            found += ["own"] if parts.side_own == "norm" else []
            for which in found:
                assert f"`run_<i>/{sublayer}_{which}_norm/scale`" in page
        for norm in HEAD_NORMS:
            extent = getattr(placement, norm)
            if extent is not None:
                width = "head_dim" if extent == "head" else EXTENT[norm]
                assert f"`run_<i>/attention/{norm}/scale` | (layers, {width})" in page
