"""What the report concludes, and which label is compared with which."""

import re

from parsed_pages import Parsed
from planted_runs import Planted, plant

from hybridnorm_jax.lab.report import significance, write_report
from hybridnorm_jax.lab.report.conclusions import conclusions
from hybridnorm_jax.lab.report.statistics import ComparedRuns
from hybridnorm_jax.lab.runs import read_runs

MINUS = "\N{MINUS SIGN}"
NOISE = (0.0, 0.01, -0.01)


def _concluded(directory, baseline="pre") -> str:
    runs = read_runs(directory)
    return " ".join(conclusions(ComparedRuns(directory=directory, runs=runs, baseline=baseline, made_by={})))


def _plant_seeds(directory, scheme, mean, *overrides, name="") -> None:
    for seed, noise in enumerate(NOISE):
        settings = {"seed": seed, "loss": mean + noise, "overrides": overrides, "name": f"{scheme}{name}-{seed}"}
        plant(directory, Planted(scheme, **settings))


def test_who_is_told_apart_and_who_is_not(tmp_path):
    for seed in range(3):
        plant(tmp_path, Planted("pre", seed=seed, loss=3.5))
    for scheme, mean in (("hybrid", 3.0), ("post", 4.0), ("span", 3.502)):
        _plant_seeds(tmp_path, scheme, mean)
    plant(tmp_path, Planted("peri", loss=None, diverged_at=52, curve=[5.0] * 52))
    text = _concluded(tmp_path)
    assert "Told apart as better than pre after Holm's correction for 3 comparisons: hybrid (" in text
    assert f"hybrid ({MINUS}0.5000 nats, {MINUS}0.5248 to {MINUS}0.4752)" in text
    assert "Told apart as worse than pre after Holm's correction for 3 comparisons: post (+0.5000 nats, " in text
    told = f"{significance.told_difference(0.01, 3):.4f}"
    correction = "after Holm's correction for 3 comparisons"
    assert f"Not told apart from pre {correction}: span. That does not mean that they are equal: with 3 seeds" in text
    assert f"a true difference of {told} nats would have been found" in text
    assert "Runs diverged of these labels at these learning rates: peri at 0.001." in text
    assert "compared with the baseline only" in text


def test_one_seed_concludes_nothing(tmp_path):
    plant(tmp_path, Planted("pre", loss=3.5))
    plant(tmp_path, Planted("post", loss=1.0))
    text = _concluded(tmp_path)
    assert text.startswith("With one seed on each side nothing can be concluded")
    assert "told apart" not in text.lower()


def test_labels_of_one_size_are_compared_with_the_baseline_of_that_size(tmp_path):
    for width, losses in {16: {"pre": 3.5, "post": 3.4}, 32: {"pre": 3.0, "post": 3.2}}.items():
        for scheme, loss in losses.items():
            _plant_seeds(tmp_path, scheme, loss, f"model.d_model={width}", name=str(width))
    page = Parsed(write_report(tmp_path, "pre, d_model=16").read_text(encoding="utf-8"))
    table = page.table("Loss minus that of its baseline, each at its own best")
    assert {label: (rows[0]["baseline"], rows[0]["difference"]) for label, rows in table.items()} == {
        "post, d_model=16": ("pre, d_model=16", f"{MINUS}0.1000"),
        "post, d_model=32": ("pre, d_model=32", "+0.2000"),
    }
    assert "Told apart as better than its baseline" in page.text


def test_the_page_begins_with_three_sentences_and_shows_best_losses(tmp_path):
    for scheme, mean in (("pre", 3.5), ("hybrid", 3.0)):
        _plant_seeds(tmp_path, scheme, mean)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    first = re.search(r"<h2[^>]*>Protocol</h2>\s*<p>(.*?)</p>", html)[1]
    assert len(re.findall(r"\.(?: |$)", first)) == 3
    assert (
        "2 labels (pre, hybrid) were trained on the same data for 6,400 tokens (100 steps) with 3 seeds each" in first
    )
    (pre,) = Parsed(html).table("Loss at each label's best learning rate")["pre"]
    # t(2, 97.5 %) = 4.302653 (any table), standard deviation 0.01.
    half = 4.302653 * 0.01 / 3**0.5
    assert pre["95 % interval"] == f"{3.5 - half:.4f} to {3.5 + half:.4f}"
    assert (pre["finished"], pre["mean loss"]) == ("3 of 3", "3.5000")
    assert (tmp_path / "figures" / "best-losses.png").exists()
    assert "prefers-color-scheme: dark" in html
    # The figures' colors are exchanged on a dark page; none is left that would not be.
    assert not re.findall(r"(?:fill|stroke): #", html)
