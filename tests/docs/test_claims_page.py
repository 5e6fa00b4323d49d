"""The papers' claims in docs/results.md are those of the table, and a measurement is entered where it belongs."""

import functools
import importlib.util

from pages import REPOSITORY

from hybridnorm_jax.lab.claims.claim import TABLE, read_claims


@functools.cache
def _script():
    spec = importlib.util.spec_from_file_location("write_claims", REPOSITORY / "docs" / "write_claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    assert _script().PAGE.read_text() == _script().page(), "run: python docs/write_claims.py"


def test_what_was_measured_is_entered_and_nothing_else_changes():
    text = TABLE.read_text()
    now = {"number": 'a: "b" #1', "date": "2030-01-01", "machine": "a machine", "reason": ""}
    first, *_, last = [claim.id for claim in read_claims().values() if claim.cheap]
    measured = [{"id": name, "verdict": "held", "seconds": 1.0, **now} for name in (first, last)]
    known = {"id": "hybrid-7b", "verdict": "held", **now}
    found = read_claims(_script().entered(text, [*measured, known]))
    before = read_claims(text)
    assert list(found) == list(before)
    assert {name for name in found if found[name] != before[name]} == {first, last}
    assert (found[last].number, found[last].verdict, found[last].date) == ('a: "b" #1', "held", "2030-01-01")
    assert (found[first].statement, found[first].scale) == (before[first].statement, before[first].scale)
    again = _script().entered(_script().entered(text, measured), measured)
    assert again == _script().entered(text, measured)
    assert "#" in text.partition("- id")[0]  # comments stay
    assert again.count("# ----") == text.count("# ----")
