"""Costs in arithmetic operations, the loss at equal ones, and budgets of operations."""

import json
import re

import numpy as np
import pytest
from parsed_pages import Parsed
from planted_runs import STEPS, Planted, plant

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.report import write_report
from hybridnorm_jax.lab.report.costs import Curve
from hybridnorm_jax.lab.run_data import RunData
from hybridnorm_jax.lab.runs import check_addition, read_runs


def _evaluated(directory, run: Planted, losses: dict[int, float]) -> None:
    """Plant a run, with evaluations before its end."""
    file = plant(directory, run) / "metrics.jsonl"
    lines = [json.dumps({"step": step, "eval/validation/loss": loss}) for step, loss in losses.items()]
    file.write_text("\n".join([*lines, file.read_text()]))


def _comparison(directory, **options) -> None:
    (directory / "comparison.json").write_text(json.dumps(options))


def test_a_curve_is_a_straight_line_between_its_points():
    curve = Curve(np.array([10.0, 20, 40]), np.array([4.0, 3.0, np.nan]), total=40.0)
    assert [curve.at(x) for x in (10, 15, 20)] == [4.0, 3.5, 3.0]
    assert curve.at(9) is None
    assert curve.at(30) is None


def test_loss_at_the_operations_of_the_cheapest_label(tmp_path):
    """post costs 1.25 of pre: at pre's 100 steps it has made 80, between its evaluations at 60 and 100."""
    for seed in range(2):
        _evaluated(tmp_path, Planted("pre", seed=seed, loss=3.2, result={"flops_per_step": 6400}), {60: 3.9})
        _evaluated(tmp_path, Planted("post", seed=seed, loss=3.0 + seed, result={"flops_per_step": 8000}), {60: 3.8})
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    table = {label: rows[0] for label, rows in page.table("Loss at 6.4e+05 operations").items()}
    assert table["post"] == {
        "label": "post",
        "operations per token": "125",
        "ratio to pre": "1.250",
        "operations of a run": "8e+05",
        "share of its steps": "80.0 %",
        "loss there": "3.6500",  # the mean of (3.8 + 3.0) / 2 and (3.8 + 4.0) / 2
        "minus pre's": "+0.4500",
        "loss at the end": "3.5000",
    }
    assert (table["pre"]["share of its steps"], table["pre"]["loss there"]) == ("100.0 %", "3.2000")
    assert "before the end of its schedule" in page.text
    assert (tmp_path / "figures" / "operations.png").exists()


def test_without_costs_there_is_no_such_section(tmp_path):
    plant(tmp_path, Planted("pre", loss=3.0))
    plant(tmp_path, Planted("post", loss=3.0, result={"flops_per_step": 10}))
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    assert not [caption for caption in page.tables if "operations" in caption]


def _with_budget(scheme: str, steps: int, each: float, **others) -> Planted:
    settings = (f"train.steps={steps}",)
    return Planted(scheme, loss=3.0, overrides=settings, result={"flops_per_step": each}, **others)


def test_runs_of_one_budget_of_operations_may_differ_in_steps(tmp_path):
    plant(tmp_path, _with_budget("pre", STEPS, 1000.0))
    plant(tmp_path, _with_budget("post", 76, 1300.0))  # 98,800: another step would be too much
    _comparison(tmp_path, flops=1e5)
    assert [run.label for run in read_runs(tmp_path)] == ["post", "pre"]
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "each label is at the end of its own schedule" in page.text
    assert page.table("All runs")["tokens per run"][0]["value"].startswith("4,864 or 6,400 (76 or 100 steps")


@pytest.mark.parametrize(
    ("flops", "says"),
    [
        (None, "pre-0.001-0 differ in train.steps (76 and 100)"),
        (2e5, "pre-0.001-0: its 100 steps are 1e+05 operations, but the budget of comparison.json is flops=200000"),
        ("much", "comparison.json: flops: must be a number above 0, or null"),
    ],
)
def test_other_budgets_are_refused_in_one_line(tmp_path, flops, says):
    plant(tmp_path, _with_budget("pre", STEPS, 1000.0))
    plant(tmp_path, Planted("post", loss=3.0, overrides=("train.steps=76",)))
    _comparison(tmp_path, flops=flops)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        read_runs(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("tokens=6400", "", "tokens (6400 and none)"),
        ("tokens=6400", "flops=1e5", "tokens (6400 and none)"),
        ("flops=1e5", "flops=2e5", "flops (100000 and 200000)"),
        ("'sweep=[1e-3, 2e-3]'", "", "sweep (0.001, 0.002 and none)"),
        ("'sweep=[1e-3]' 'sweep_seeds=[7]'", "'sweep=[1e-3]' 'sweep_seeds=[8]'", "sweep_seeds (7 and 8)"),
        ("'sweep=[1e-3]'", "'sweep=[1e-3]' 'sweep_seeds=[8]'", "sweep_seeds (100 and 8)"),
    ],
)
def test_runs_of_different_protocols_are_refused_in_one_line(tmp_path, one, other, says):
    command = "hybridnorm lab compare lab"
    plant(tmp_path, Planted("pre", loss=3.0, name="one", result={"command": f"{command} {one} --only=0"}))
    plant(tmp_path, Planted("post", loss=3.0, name="two", result={"command": f"{command} {other} --only=3"}))
    with pytest.raises(UserError, match=re.escape(f"one and two were asked for with different {says}")) as caught:
        read_runs(tmp_path)
    assert "\n" not in str(caught.value)


def test_one_protocol_may_be_written_in_several_ways(tmp_path):
    commands = ("'sweep=[1e-3, 2e-3]'", "sweep=[4e-3,2e-3,0.001] 'sweep_seeds=[100]' tokens=null", "it's")
    for seed, command in enumerate(commands[:2]):
        plant(tmp_path, Planted("pre", seed=seed, loss=3.0, result={"command": f"hybridnorm lab compare {command}"}))
    assert len(read_runs(tmp_path)) == 2
    plant(tmp_path, Planted("pre", seed=2, loss=3.0, result={"command": commands[2]}))
    with pytest.raises(UserError, match="different sweep"):
        read_runs(tmp_path)


def test_a_comparison_of_another_protocol_is_refused_before_it_trains(tmp_path):
    plant(tmp_path, Planted("pre", loss=3.0, name="there", result={"command": "hybridnorm lab compare tokens=6400"}))
    plant(tmp_path / "elsewhere", Planted("post", loss=3.0, name="asked"))
    (asked,) = read_runs(tmp_path / "elsewhere")
    data = RunData(train_tokens=3200, files={})
    check_addition(tmp_path, [asked.config], data, "hybridnorm lab compare tokens=6400 'schemes=[post]'")
    with pytest.raises(UserError, match=r"tokens \(none and 6400\): .*; choose another run.name"):
        check_addition(tmp_path, [asked.config], data, "hybridnorm lab compare 'schemes=[post]'")
