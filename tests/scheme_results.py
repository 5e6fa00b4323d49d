"""Where tests/scheme_checks.py keeps its results, and of which scheme a row is."""

import dataclasses
import hashlib
from pathlib import Path

import hybridnorm_jax as hn

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "schemes.json"


def digest(scheme: str) -> str:
    """Of the scheme at four layers, as text without its source: a row with another digest is of another model."""
    rule = dataclasses.replace(hn.SCHEMES[scheme], source="", checked=None)
    return hashlib.sha256(rule.table(4).encode()).hexdigest()[:12]
