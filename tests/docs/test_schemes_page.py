"""docs/schemes.md and its pictures are those of the table of schemes, and its results are of these schemes."""

import dataclasses
import functools
import importlib.util
import json
import re
import xml.etree.ElementTree as ET

import pytest
from pages import REPOSITORY

import hybridnorm_jax as hn
from tests.scheme_results import RESULTS, digest

SVG = "{http://www.w3.org/2000/svg}"


@functools.cache
def _script():
    spec = importlib.util.spec_from_file_location("write_schemes", REPOSITORY / "docs" / "write_schemes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _pictures():
    return _script().pictures()


def test_the_page_is_up_to_date_but_for_its_exports(monkeypatch):
    """How each scheme is exported, which takes seconds to find out, is what the page says."""
    text = _script().PAGE.read_text()
    exports = dict(re.findall(r'id="(\w+)"><summary>.*?\n- Exports: (.*?)\n', text, re.DOTALL))
    monkeypatch.setattr(_script(), "export_words", exports.__getitem__)
    assert text == _script().page(), "run: python docs/write_schemes.py"


@pytest.mark.long
def test_the_page_is_up_to_date():
    assert _script().PAGE.read_text() == _script().page(), "run: python docs/write_schemes.py"


def test_the_pictures_are_up_to_date():
    files = {file.stem: file.read_text() for file in _pictures().FOLDER.glob("*.svg")}
    assert files == {name: _pictures().drawing(name) for name in hn.SCHEMES}, "run: python docs/write_schemes.py"


def test_every_scheme_is_in_one_family():
    named = [name for family in _script().FAMILIES for name in family.names]
    assert sorted(named) == sorted(hn.SCHEMES)
    assert set(_script().DIVERGES) <= set(hn.SCHEMES)


def test_a_field_of_a_placement_has_a_picture():
    for kind, shown in _pictures().SHOWN.items():
        assert {field.name for field in dataclasses.fields(kind)} == set(shown), "draw it in docs/pictures/blocks.py"


def _norms(sublayer):
    """How many norms of a sublayer stand outside its branch's function."""
    on_side = (sublayer.side == "read") + (sublayer.side_own == "norm")
    return sublayer.pre + sublayer.branch + sublayer.post + sublayer.entry + on_side


@pytest.mark.parametrize("name", hn.SCHEMES)
def test_a_picture_has_every_norm_and_number_and_nothing_outside_of_it(name):
    svg = ET.fromstring(_pictures().drawing(name))
    width, height = map(float, svg.get("viewBox").split()[2:])
    boxes = svg.findall(f"{SVG}rect")
    blocks = [placement for _, placement in _pictures().stretches(hn.SCHEMES[name])]
    sublayers = [sublayer for block in blocks for sublayer in (block.attention, block.feed_forward)]
    assert sum(box.get("class") == "norm" for box in boxes) == sum(map(_norms, sublayers))
    assert sum(box.get("class") == "branch" for box in boxes) == len(sublayers)
    for box in boxes:
        assert 0 < float(box.get("x")) < width - float(box.get("width"))
        assert 0 < float(box.get("y")) < height - float(box.get("height"))
    words = [text.text for text in svg.findall(f"{SVG}text")]
    for sublayer in sublayers:
        for scale in {*sublayer.scales, *sublayer.starts} - {1.0}:
            assert any(f"{scale:.3g}" in word for word in words), scale
    for text in svg.findall(f"{SVG}text"):
        half = 3.6 * len(text.text) * (0.5 if text.get("text-anchor") == "middle" else 1)
        left = float(text.get("x")) - (half if text.get("text-anchor") == "middle" else 0)
        assert left > -4, text.text
        assert left + (2 if text.get("text-anchor") == "middle" else 1) * half < width + 6, text.text


def test_pictures_differ_where_placements_do():
    by_picture = {}
    for name, scheme in hn.SCHEMES.items():
        shapes = re.sub(r'aria-label="[^"]*"', "", _pictures().drawing(name))
        by_picture.setdefault(shapes, set()).add(tuple(p for _, p in _pictures().stretches(scheme)))
    assert [group for group in by_picture.values() if len(group) > 1] == []


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/placements.md", "docs/glossary.md"])
def test_pages_count_the_schemes_right(page):
    text = (REPOSITORY / page).read_text()
    counted = re.findall(r"\b(\d+) (?:schemes of|schemes is)|(?:prints all|There are) (\d+)\b", text)
    assert counted
    assert {int(first or second) for first, second in counted} == {len(hn.SCHEMES)}


# ---- The results.


def test_the_results_are_of_the_schemes_as_they_are():
    rows = json.loads(RESULTS.read_text())
    assert list(rows) == list(hn.SCHEMES)
    for name, row in rows.items():
        assert row["digest"] == digest(name), f"run: python -m tests.scheme_checks {name}"
        assert row["gradients"]["gradient"] < 1e-6
        assert row["export"] < 1e-12
    assert {name for name, row in rows.items() if not row["golden"]} == {
        name for name, scheme in hn.SCHEMES.items() if scheme.checked == "equation only"
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["layernorm_scaling", "hybrid"])
def test_a_row_of_the_results_is_what_a_run_gives(name):
    from tests.scheme_checks import converted, gradients  # which imports torch

    row = json.loads(RESULTS.read_text())[name]
    assert row["convert"] == converted(name)
    assert set(row["gradients"]) == set(gradients(name))  # which raises where they are wrong
