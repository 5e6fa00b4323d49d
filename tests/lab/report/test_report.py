"""The lab's report: what it says of runs that were planted with known numbers, and which directories it refuses."""

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from parsed_pages import Parsed
from planted_runs import STEPS, Planted, plant

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.report import write_report
from hybridnorm_jax.lab.report.layer_figures import QUANTITIES, layer_figure
from hybridnorm_jax.lab.report.loss_figures import loss_curves
from hybridnorm_jax.lab.runs import read_runs
from hybridnorm_jax.model.schemes import SCHEMES

MINUS = "\N{MINUS SIGN}"

# Differences hybrid - pre by seed: -0.10, -0.20, -0.06; mean -0.12, sample variance (0.02^2 + 0.08^2 + 0.06^2) / 2 =
# 0.0052. Student's t, 2 degrees of freedom, 97.5 %: 4.302653 (any table). 4.302653 sqrt(0.0052 / 3) = 0.179133.
PRE, HYBRID = (3.50, 3.60, 3.46), (3.40, 3.40, 3.40)
HALF_WIDTH = 4.302653 * math.sqrt(0.0052 / 3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """pre and hybrid with three seeds at one rate, one at another; post, with one run diverged and one unfinished."""
    directory = tmp_path_factory.mktemp("lab")
    for seed, (pre, hybrid) in enumerate(zip(PRE, HYBRID, strict=True)):
        plant(directory, Planted("pre", seed=seed, loss=pre, watched=True))
        plant(directory, Planted("hybrid", seed=seed, loss=hybrid, watched=True))
    plant(directory, Planted("pre", rate=1e-2, loss=3.7))
    plant(directory, Planted("hybrid", rate=1e-2, loss=3.3))
    plant(directory, Planted("post", seed=0, loss=4.0))
    broken = [5.0] * 50 + [900.0, math.nan]
    plant(directory, Planted("post", seed=1, loss=None, diverged_at=52, curve=broken))
    plant(directory, Planted("post", seed=2, loss=None, finished=False, curve=[5.5] * 20))
    (directory / "figures").mkdir()
    made_by = {"commands": ["hybridnorm lab compare <&> schemes=[pre]"], "schemes": ["pre"]}
    (directory / "comparison.json").write_text(json.dumps(made_by))
    assert write_report(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def parsed(planted) -> Parsed:
    return Parsed((planted / "report.html").read_text(encoding="utf-8"))


def test_every_run_is_named_in_all_three_files(planted, parsed):
    names = {path.name for path in planted.iterdir() if (path / "config.yaml").exists()}
    assert len(names) == 11
    assert parsed.table("Every run").keys() == names
    markdown = (planted / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in markdown and f"- {name}: `" in markdown for name in names)
    with open(planted / "report.csv", encoding="utf-8") as file:
        assert {row["run"] for row in csv.DictReader(file)} == names
    for name in names - {"post-0.001-2"}:
        assert json.loads((planted / name / "result.json").read_text())["command"] in parsed.text
    assert "hybridnorm lab compare <&> schemes=[pre]" in parsed.text


def test_paired_differences_are_those_computed_by_hand(parsed):
    low, high = -0.12 - HALF_WIDTH, -0.12 + HALF_WIDTH
    at_1e3, at_1e2 = parsed.table("Loss minus pre's at the same")["hybrid"]
    assert (at_1e3["learning rate"], at_1e3["seeds"], at_1e3["difference"]) == ("0.001", "3", f"{MINUS}0.1200")
    assert at_1e3["95 % interval"] == f"{MINUS}{-low:.4f} to +{high:.4f}" == f"{MINUS}0.2991 to +0.0591"
    assert at_1e3["reading"].startswith("not told apart")
    assert (at_1e2["learning rate"], at_1e2["seeds"], at_1e2["difference"]) == ("0.01", "1", f"{MINUS}0.4000")
    assert at_1e2["95 % interval"] == "—"
    assert at_1e2["reading"].startswith("one seed")
    (post,) = parsed.table("Loss minus pre's at the same")["post"]
    assert (post["seeds"], post["difference"]) == ("1 of 3", "+0.5000")


def test_best_rate_is_not_that_of_fewer_seeds(parsed):
    # hybrid's one run at 0.01 has the lowest loss of all.
    (hybrid,) = parsed.table("Loss minus pre's, each at its own best")["hybrid"]
    assert (hybrid["its rate"], hybrid["baseline's rate"], hybrid["mean loss"]) == ("0.001", "0.001", "3.4000")
    assert "hybrid (smallest, 0.001)" in parsed.text
    assert "post (" not in parsed.text


def test_final_losses_count_what_finished_diverged_and_did_not_end(parsed):
    table = parsed.table("Loss (validation")
    (post,) = table["post"]
    assert [post[f"seed {seed}"] for seed in range(3)] == ["4.0000", "diverged", "—"]
    assert [post[name] for name in ("finished", "diverged", "unfinished")] == ["1", "1", "1"]
    pre = table["pre"][0]
    assert (pre["mean"], pre["std. dev."]) == ("3.5200", f"{np.std(PRE, ddof=1):.4f}")
    assert post["std. dev."] == "—"
    assert "No number of this report includes the runs that are unfinished: post-0.001-2." in parsed.text


def test_stability_map_says_in_text_what_the_shading_shows(parsed):
    table = {label: rows[0] for label, rows in parsed.table("Mean final loss by label").items()}
    assert table["post"]["learning rate 0.001"] == "4.0000 (1 of 2); diverged at step 52; unfinished: 1"
    assert table["post"]["learning rate 0.01"] == "not run"
    assert table["hybrid"]["learning rate 0.01"] == "3.3000"


def test_spikes_and_norms(parsed):
    rows = parsed.table("Spike scores")
    (post,) = rows["post"]
    # 100 steps of seed 0 without a spike; 52 of seed 1, of which NaN counts: nothing is 7 deviations of 0 away.
    assert (post["steps"], post["loss spikes"]) == ("152", f"{100 / 52 / 2:.2f} %")
    pre = rows["pre"][0]
    assert (pre["loss spikes"], pre["steps"]) == ("0.00 %", "300")
    assert (pre["norm 50 %"], pre["90 %"], pre["99 %"]) == ("50.5", "90.1", "99.0")


def test_throughput_is_shown_where_it_is_asked_for(planted, parsed, tmp_path):
    """A tenth of the steps of one run was made beside other work, another run all of them."""
    assert "This report shows no throughput." in parsed.text
    assert not [caption for caption in parsed.tables if "Tokens per second" in caption]
    assert "tokens_per_second" not in (planted / "report.csv").read_text()
    plant(tmp_path, Planted("pre", loss=3.0))
    busy = plant(tmp_path, Planted("post", loss=3.0)) / "metrics.jsonl"
    busy.write_text(busy.read_text().replace("[0.064, ", "[0.128, "))
    slow = plant(tmp_path, Planted("hybrid", loss=3.0)) / "metrics.jsonl"
    slow.write_text(slow.read_text().replace("0.064", "0.128"))
    # Even where its lines say something else, as those of old runs do.
    page = Parsed(write_report(tmp_path, speed=True).read_text(encoding="utf-8"))
    speed = page.table("Tokens per second")
    shown = {label: (rows[0]["median"], rows[0]["ratio to pre"]) for label, rows in speed.items()}
    assert shown == {"pre": ("1,000", "1.000"), "post": ("1,000", "1.000"), "hybrid": ("500", "0.500")}
    assert "The wait for input is included." in page.text
    assert "tokens_per_second" in (tmp_path / "report.csv").read_text()


def test_the_page_says_what_is_paired(parsed, tmp_path):
    assert "read the data in the same order. A seed is left out" in parsed.text
    for scheme in ("pre", "post"):
        plant(tmp_path, Planted(scheme, loss=3.0, overrides=("train.data_seed=0",)))
    text = Parsed(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "The order of the data is the same for all seeds: it does not add to the differences" in text


def test_figures_show_the_planted_numbers(planted):
    runs = read_runs(planted)
    pre = [run for run in runs if run.label == "pre" and run.rate == 1e-3]
    curve = loss_curves(pre, [1e-3], "validation").axes[0]
    means = [np.mean(rows) for rows in zip(*([loss for _, loss in run.losses] for run in pre), strict=True)]
    drawn = next(line for line in curve.get_lines() if len(line.get_xdata()) == STEPS)
    # A fiftieth of 100 steps: each point is the mean of two, the first of one.
    np.testing.assert_allclose(drawn.get_ydata(), [means[0], *np.convolve(means, [0.5, 0.5], "valid")])
    np.testing.assert_array_equal(drawn.get_xdata(), np.arange(1, STEPS + 1) * 64)
    (validation,) = [line for line in curve.get_lines() if len(line.get_xdata()) == 1]
    np.testing.assert_allclose(validation.get_ydata(), [np.mean(PRE)])
    stream = next(quantity for quantity in QUANTITIES if quantity.name == "stream-rms")
    first, last = layer_figure(stream, {"pre": pre}).axes
    # 0 is the embedding, and what is measured in a block has its number, from 1.
    np.testing.assert_array_equal(first.get_lines()[0].get_xdata(), [0, 1, 2, 3])
    np.testing.assert_allclose(first.get_lines()[0].get_ydata(), [10, 20, 30, 40])
    np.testing.assert_allclose(last.get_lines()[0].get_ydata(), [100, 200, 300, 400])
    ratio = next(quantity for quantity in QUANTITIES if quantity.name == "update-ratio")
    in_blocks = layer_figure(ratio, {"pre": pre}).axes[1].get_lines()[0]
    np.testing.assert_array_equal(in_blocks.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(in_blocks.get_ydata(), [0.01] * 3)


def test_a_loss_that_diverged_does_not_decide_the_axis(planted):
    runs = [run for run in read_runs(planted) if run.label == "post" and run.status != "unfinished"]
    bottom, top = loss_curves(runs, [1e-3], "validation").axes[0].get_ylim()
    assert 3.5 < bottom < 4.0
    assert top < 7


def test_csv_has_the_numbers_unrounded(planted):
    with open(planted / "report.csv", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    row = rows["pre-0.001-2"]
    assert [row[name] for name in ("label", "scheme", "learning_rate", "seed")] == ["pre", "pre", "0.001", "2"]
    assert [row[name] for name in ("status", "final_loss", "loss_validation")] == ["finished", "3.46", "3.46"]
    assert [row[name] for name in ("seconds", "tokens", "train_tokens")] == ["62.0", "6400", "3200"]
    assert [float(row[f"grad_norm_p{q}"]) for q in (50, 90, 99)] == pytest.approx([50.5, 90.1, 99.01])
    post = rows["post-0.001-1"]
    assert [post[name] for name in ("status", "diverged_at", "final_loss")] == ["diverged", "52", ""]
    assert [rows["post-0.001-2"][name] for name in ("status", "step", "final_loss")] == ["unfinished", "20", ""]


def test_page_needs_nothing_else(planted, parsed):
    assert all(reference.startswith("#") for reference in parsed.references)
    assert {reference[1:] for reference in parsed.references} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    text = (planted / "report.html").read_text(encoding="utf-8")
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"<>)]+", text)) <= namespaces
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert text.count("<svg") == 1 + 1 + 2 + 7  # best losses, learning rates, curves, seven quantities of the layers


def test_markdown_has_the_same_tables_and_its_figures(planted, parsed):
    markdown = (planted / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert len(pictures) == 11
    assert all((planted / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert f"| hybrid | 0.001 | 3 | {MINUS}0.1200 | {MINUS}0.2991 to +0.0591 |" in markdown
    rows = sum(len(rows) + 1 for rows in parsed.tables.values())
    assert sum(line.startswith("|") for line in markdown.splitlines()) == rows


def test_the_share_of_compilation_is_told(tmp_path):
    """60 and 61 seconds, of which 12 and 0.1 were compilation."""
    for seed, compiling in enumerate((12.0, 0.1)):
        plant(tmp_path, Planted("pre", seed=seed, loss=3.0, result={"compile_seconds": compiling}))
    (row,) = Parsed(write_report(tmp_path).read_text(encoding="utf-8")).table("All runs")["wall time"]
    assert row["value"] == "2.0 min in all, 60.5 s per run (median), 10.0% of it compiling"


def test_another_baseline(tmp_path):
    plant(tmp_path, Planted("pre", loss=3.5))
    plant(tmp_path, Planted("hybrid", loss=3.4))
    parsed = Parsed(write_report(tmp_path, "hybrid").read_text(encoding="utf-8"))
    assert parsed.table("Loss minus hybrid's at the same")["pre"][0]["difference"] == "+0.1000"


@pytest.mark.parametrize(
    ("asked", "says"), [("hybird", "did you mean 'hybrid'?"), ("nothing_like_it", "known: hybrid, post, pre")]
)
def test_unknown_baseline(planted, asked, says):
    with pytest.raises(UserError, match=re.escape(f"baseline={asked}: no run has it; {says}")):
        write_report(planted, asked)


def test_several_labels_of_one_scheme(tmp_path):
    plant(tmp_path, Planted("pre", loss=3.0, name="a"))
    plant(tmp_path, Planted("pre", loss=2.9, name="b", overrides=("model.d_model=32",)))
    plant(tmp_path, Planted("hybrid", loss=2.8, name="c", overrides=("optimizer.clip=null",)))
    with pytest.raises(UserError, match=r"baseline=pre: is any of 'pre, d_model=16, clip=1\.0'; 'pre, d_model=32"):
        write_report(tmp_path, "pre")
    parsed = Parsed(write_report(tmp_path, "pre, d_model=32, clip=1.0").read_text(encoding="utf-8"))
    differs = parsed.table("Labels:")["hybrid, d_model=16, clip=null"][0]
    assert differs["differs from pre, d_model=32, clip=1.0 in"] == (
        "model.scheme: pre → hybrid; model.d_model: 32 → 16; optimizer.clip: 1.0 → null"
    )


def test_a_directory_in_which_nothing_has_ended(tmp_path):
    plant(tmp_path, Planted(loss=None, finished=False, curve=[5.0] * 20))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No number of this report includes the runs that are unfinished: pre-0.001-0." in text


def test_without_a_validation_set_the_training_loss_is_compared(tmp_path):
    for scheme, end in (("pre", 3.0), ("post", 2.5)):
        curve = [6.0] * (STEPS - 2) + [end - 0.1, end + 0.1]
        plant(tmp_path, Planted(scheme, loss=end, curve=curve, result={"scores": {}}))
    parsed = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "There is no validation set" in parsed.text
    # A fiftieth of 100 steps: the last two.
    assert parsed.table("Loss minus pre's at")["post"][0]["difference"] == f"{MINUS}0.5000"


def test_names_from_plugins_are_escaped(tmp_path, monkeypatch):
    evil = "<script>alert('1')</script>|`x`"
    monkeypatch.setitem(SCHEMES, evil, SCHEMES["pre"])
    run = plant(tmp_path, Planted("pre", loss=3.0, name="evil"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["scheme"] = evil
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    plant(tmp_path, Planted("pre", loss=3.1))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text
    assert evil in Parsed(text).table("Loss (validation")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert('1')&lt;/script&gt;\\|\\`x\\`" in markdown
    assert "<script" not in markdown


def test_without_matplotlib_one_line_names_the_extra(tmp_path, monkeypatch):
    plant(tmp_path, Planted(loss=3.0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"figures: needs the extra `lab`: pip install 'hybridnorm-jax\[lab\]'"):
        write_report(tmp_path)
