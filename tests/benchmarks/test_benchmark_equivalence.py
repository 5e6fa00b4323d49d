"""benchmarks/equivalence.py from start to JSON, with models so small that their times mean nothing."""

import importlib
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn

REPOSITORY = Path(__file__).parents[2]
FORMS = {
    "pre_ln",
    "pre_ln_one_pass",
    "pre_ln_plain",
    "pre_rmsnorm",
    "pre_crmsnorm",
    "pre_crmsnorm_padded",
    "crmsnorm",
    "no_norm",
}
KEYS = {"device", "devices", "threads", "dtype", "jax", "glibc_tunables", "rounds", "paper", "agreement", "contests"}


def _run(*arguments):
    # In a process of its own: the benchmark enters a scheme without norms into the table.
    command = [sys.executable, str(REPOSITORY / "benchmarks/equivalence.py"), *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _check(contest):
    """Its keys, and that every number is one."""
    assert contest.keys() == {"layers", "full_layers", "outputs", "batch", "seq", "forms"}
    for form in contest["forms"].values():
        lower, upper = form["quartiles"]
        assert 0 < lower <= form["ratio"] <= upper < math.inf
        assert 0 < form["seconds"] < math.inf
    assert contest["forms"]["pre_ln"]["ratio"] == 1


def test_the_one_pass_norm_can_take_the_place_of_ours(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    one_pass = importlib.import_module("norm_forms").one_pass_layer_norm
    ours, theirs = (set(inspect.signature(function).parameters) for function in (hn.layer_norm, one_pass))
    assert ours == theirs
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    for axis in (-1, (2,), (1, 2)):
        arguments = {"scale": jnp.full(8, 2.0), "bias": jnp.ones(8), "eps": 1e-5, "axis": axis}
        np.testing.assert_allclose(one_pass(x, **arguments), hn.layer_norm(x, **arguments), atol=1e-5)


@pytest.mark.slow
def test_forward_has_a_ratio_for_every_form():
    result = _run("--shapes", "tiny", "--modes", "forward", "--layers", "1", "--seq", "8", "--rounds", "2")
    assert result.keys() == KEYS
    assert result["rounds"] == 2
    (contest,) = result["contests"].values()
    _check(contest)
    assert (contest["layers"], contest["full_layers"], contest["outputs"]) == (1, 2, 32)
    assert contest["forms"].keys() == FORMS
    count = {name: form["parameters"] for name, form in contest["forms"].items()}
    assert count["pre_crmsnorm"] < count["pre_rmsnorm"] < count["pre_crmsnorm_padded"]
    assert count["crmsnorm"] == count["pre_ln_plain"] == count["no_norm"] == count["pre_ln"] - 3 * 2 * 32
    assert result["agreement"]["tiny"].keys() == FORMS - {"pre_ln", "no_norm"}
    assert all(0 < difference < 1e-5 for difference in result["agreement"]["tiny"].values())


@pytest.mark.slow
def test_a_training_step_times_the_conversion_too():
    result = _run("--shapes", "tiny_vit", "--modes", "train", "--forms", "pre_crmsnorm_padded", "--rounds", "2")
    contest = result["contests"]["tiny_vit train"]
    _check(contest)
    assert contest["forms"].keys() == {"pre_ln", "pre_crmsnorm_padded"}
    assert 0 < contest["forms"]["pre_crmsnorm_padded"]["conversion_seconds"] < math.inf
    assert 0 < result["agreement"]["tiny_vit"]["pre_crmsnorm_padded"] < 1e-5
