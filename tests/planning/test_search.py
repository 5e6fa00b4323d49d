"""What a search tries and prefers, and that plans are found again, with plans that a test makes up."""

import json
import subprocess
import sys

import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config import plugins
from hybridnorm_jax.planning import search as module
from hybridnorm_jax.planning import stored_plans
from hybridnorm_jax.planning.compare import comparison
from hybridnorm_jax.planning.compilation import read_config
from hybridnorm_jax.planning.model_parts import PARTS
from hybridnorm_jax.planning.search import search, table
from hybridnorm_jax.planning.stored_plans import Planned, identity, plan_one
from hybridnorm_jax.planning.topologies import parse_topology

NORM = """import hybridnorm_jax as hn
@hn.norm_kind('mine', parameters=[hn.NormParameter('a')])
def mine(x, a):
    return {}
"""
BASE = ("quickstart", "train.batch_size=32", "model.remat=none")
TOPOLOGY = parse_topology("h100:4")
POLICY_SECONDS = {"none": 1, "all_but_attention": 2, "dots": 3, "dots_no_batch": 4, "full": 5}


def report(seconds=(1.0, 1.0), *, fits=True, peak=2**30):
    """A report of plan_report.as_json, as much of it as is read here."""
    counts = {name: dict.fromkeys(PARTS, 10**12) for name in ("product_flops", "kernel_flops")}
    counts |= {name: dict.fromkeys(PARTS, 2**30) for name in ("memory_bytes", "sent_bytes")}
    return {
        "fits": fits,
        "remat": "all_but_attention",
        "parameters": 100,
        "memory_per_device": {"peak": peak, "arguments": 1, "temporaries": 1},
        "counts_per_step_and_device": counts,
        "collectives_per_step_and_device": {"all-gather": {"count": 1, "bytes": 10**6}},
        "roofline_seconds": {"arithmetic": seconds[0], "HBM": seconds[1]},
        "bound_by": "HBM",
        "upper_bound_tokens_per_second": 1 / max(seconds),
        "upper_bound_mfu": 0.5,
    }


@pytest.fixture
def planned(monkeypatch):
    """Every setting that is planned. It fits where what is kept fits: remat and microbatches make it smaller."""
    asked = []

    def plan_all(settings, topology, jobs):
        for setting in settings:
            asked.append(setting)
            config = read_config(setting)
            fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
            policy = POLICY_SECONDS[config.model.remat]
            peak = 1000 / fsdp / policy / config.train.grad_accumulation
            seconds = 10 + policy + 20 * (tensor - 1) + config.train.grad_accumulation / 10
            yield Planned(setting, report((seconds, 1.0), fits=peak < 100, peak=peak), None)

    monkeypatch.setattr(module, "plan_all", plan_all)
    return asked


def _search(most=60):
    return search(BASE, TOPOLOGY, jobs=1, most=most, tell=lambda _: None)


def test_the_best_that_fits_is_found_though_it_needs_two_changes(planned):
    found = _search()
    best = dict(each.split("=", 1) for each in found.planned[0].setting[1:])
    # 1000 / 4 / policy / microbatches must be under 100. Remat alone does that as well, and costs more.
    assert (best["mesh.fsdp"], best["mesh.tensor"], best["model.remat"]) == ("4", "1", "none")
    assert best["train.grad_accumulation"] == "4"
    assert found.planned[0].report["fits"]
    assert found.is_whole
    fits = [each.report["fits"] for each in found.planned]
    assert fits == sorted(fits, reverse=True)


def test_nothing_is_planned_twice_and_no_more_than_asked_for(planned):
    _search()
    identities = [identity(read_config(setting), TOPOLOGY) for setting in planned]
    assert len(set(identities)) == len(identities)
    planned.clear()
    found = _search(most=7)
    assert (len(planned), len(found.planned), found.is_whole) == (7, 7, False)


def test_every_candidate_is_a_run_that_could_be(planned):
    _search()
    for setting in planned:
        config = read_config(setting)
        sizes = config.mesh.sizes.values()
        assert all(size > 0 for size in sizes) or setting == BASE
        assert config.model.num_kv_heads % config.mesh.tensor == 0


def test_the_table_says_what_was_changed(planned):
    rows = table(_search(), BASE, 3).splitlines()
    assert len(rows) == 4
    assert "train.grad_accumulation=4" in rows[1]
    assert all("  all_but_attention " in row for row in rows[1:])  # of the report: model.remat=auto does not say it
    assert "<=" in rows[0]  # upper bounds


def test_a_comparison_has_ratios():
    lines = comparison(report((2.0, 1.0)), report((3.0, 1.0), peak=2**31, fits=False)).splitlines()
    cells = {line[:36].strip(): line[36:].split() for line in lines}
    assert cells["peak memory, GiB"] == ["1", "2", "2.000"]
    assert cells["arithmetic at peak, ms"] == ["2,000", "3,000", "1.500"]
    assert cells["products, TFLOP: all"] == ["5", "5", "1.000"]
    assert cells["fits"] == ["yes", "no"]
    assert cells["remat"] == ["all_but_attention"] * 2  # model.remat=auto does not say what was chosen


@pytest.fixture
def processes(monkeypatch, tmp_path):
    """Every process that would be started; each prints the same report."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    started = []

    def run(line, **_):
        started.append(line)
        wrong = any("scheme=nothing" in word for word in line)
        return subprocess.CompletedProcess(
            line, 2 if wrong else 3, json.dumps(report()), "warning\nerror: it is wrong\n"
        )

    monkeypatch.setattr(stored_plans.subprocess, "run", run)
    return started


def test_a_plan_is_made_once_for_what_means_the_same(processes, tmp_path):
    first = plan_one(("quickstart", "model.remat=full"), TOPOLOGY)
    again = plan_one(("quickstart", "run.name=other", "mesh.data=4", "model.remat=full"), TOPOLOGY)  # data is -1
    assert first.report == again.report == report()
    assert len(processes) == len(list(tmp_path.rglob("*.json"))) == 1
    assert processes[0][:4] == [sys.executable, "-m", "hybridnorm_jax", "plan"]


@pytest.mark.parametrize(
    ("change", "topology"),
    [("model.remat=dots", "h100:4"), ("mesh.data=2", "2xh100:4"), ("model.remat=full", "h100:2")],
)
def test_what_means_something_else_is_planned_again(change, topology, processes):
    plan_one(("quickstart", "model.remat=full"), TOPOLOGY)
    plan_one(("quickstart", "model.remat=full", change), parse_topology(topology))
    assert len(processes) == 2


def test_another_share_of_the_memory_is_another_plan(processes, monkeypatch):
    plan_one(("quickstart",), TOPOLOGY)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    plan_one(("quickstart",), TOPOLOGY)
    assert len(processes) == 2


def test_an_edited_plugin_is_another_plan(processes, monkeypatch, tmp_path):
    """The name of a kind of norm, or of a scheme, stays, and means something else."""
    file = tmp_path / "mine.py"
    setting = ("quickstart", f"run.plugins=[{file}]", "model.norm=mine")
    for function in ("x + 0 * a", "x + 0 * a", "x * a"):
        file.write_text(NORM.format(function))
        monkeypatch.setattr(plugins, "_imported", {})
        hn.NORM_KINDS.pop("mine", None)
        plan_one(setting, TOPOLOGY)
    assert len(processes) == 2


def test_what_is_refused_is_said_and_not_kept(processes, tmp_path, monkeypatch):
    assert "did you mean" in plan_one(("quickstart", "model.scheem=pre"), TOPOLOGY).refusal
    monkeypatch.setattr(stored_plans, "_WITH_REPORT", ())
    assert plan_one(("quickstart",), TOPOLOGY) == Planned(("quickstart",), None, "it is wrong")
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--search", "--topology", "gpu:8x80GB"], "has no data sheet"),
        (["quickstart", "--search", "--compare", "a", "b"], "choose one of them"),
        (["quickstart", "--compare", "model.scheem=pre", "", "--topology", "h100:1"], "--compare, A: "),
        (["quickstart", "--search", "--jobs", "0"], "must be a whole number from 1 to 9999"),
        (["--search"], "name a configuration"),
        (["quickstart", "--topology", "h100:1", "--jobs", "4"], "belong to --search"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")
