"""What the report says of differences: pairing, the choice of rates by a sweep, corrections, and power."""

import json

import numpy as np
import pytest
from parsed_pages import Parsed
from planted_runs import Planted, plant

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.report import significance, write_report

pytestmark = pytest.mark.usefixtures("tables_alone")

MINUS = "\N{MINUS SIGN}"


def _page(directory) -> Parsed:
    return Parsed(write_report(directory).read_text(encoding="utf-8"))


def _swept(directory, **options) -> None:
    options = {"sweep": [1e-3, 2e-3, 4e-3], "sweep_seeds": [100], **options}
    (directory / "comparison.json").write_text(json.dumps(options))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """pre is best at 2e-3 with the sweep's seed, and hybrid at 4e-3; their seeds 0 and 1 say something else."""
    directory = tmp_path_factory.mktemp("swept")
    for scheme, losses in {"pre": (3.6, 3.4, 3.5), "hybrid": (3.6, 3.5, 3.3)}.items():
        for rate, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True):
            plant(directory, Planted(scheme, rate=rate, seed=100, loss=loss))
    for seed, (pre, hybrid) in enumerate([(3.7, 3.2), (3.8, 3.4)]):
        plant(directory, Planted("pre", rate=2e-3, seed=seed, loss=pre))
        plant(directory, Planted("hybrid", rate=4e-3, seed=seed, loss=hybrid))
    # By its losses this rate would be the best one of pre; it was not in the sweep.
    plant(directory, Planted("pre", rate=3e-3, seed=0, loss=1.0))
    _swept(directory)
    return _page(directory)


def test_a_sweep_chooses_the_rate_and_other_seeds_are_compared(swept):
    (hybrid,) = swept.table("Loss minus pre's, each at its own best")["hybrid"]
    assert (hybrid["its rate"], hybrid["baseline's rate"], hybrid["seeds"]) == ("0.004", "0.002", "2")
    # 3.2 - 3.7 and 3.4 - 3.8: without the sweep's 3.3 - 3.4.
    assert (hybrid["mean loss"], hybrid["difference"]) == ("3.3000", f"{MINUS}0.4500")
    assert "seed 100" not in swept.table("Loss (validation")["pre"][0]
    assert "found by a sweep with seed 100 only, so that the choice favors no label" in swept.text
    assert "hybrid (largest, 0.004)" in swept.text
    assert "pre (smallest" not in swept.text
    assert "pre (largest" not in swept.text


def test_the_stability_map_of_a_sweep_shows_its_own_seeds(swept):
    (row,) = swept.table("Mean final loss by label")["pre"]
    assert row == {
        "label": "pre",
        **{"learning rate 0.001": "3.6000", "learning rate 0.002": "3.4000", "learning rate 0.004": "3.5000"},
    }


def test_a_sweep_before_any_other_seed_compares_nothing(tmp_path):
    for scheme in ("pre", "post"):
        plant(tmp_path, Planted(scheme, seed=100, loss=3.0))
    _swept(tmp_path)
    assert "Nothing can be compared" in _page(tmp_path).text


def test_a_label_without_a_run_of_the_sweep_has_no_best_rate(tmp_path):
    """Its sweep's runs were removed, or made with other seeds."""
    plant(tmp_path, Planted("pre", seed=100, loss=3.0))
    for scheme in ("pre", "post"):
        plant(tmp_path, Planted(scheme, seed=0, loss=3.0))
    _swept(tmp_path)
    assert "Nothing can be compared" in _page(tmp_path).text


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sweep_seeds": 5}, "sweep_seeds: must be a list of integers"),
        ({"commands": "x"}, "commands: must be a list of t"),
    ],
)
def test_a_damaged_description_is_refused_in_one_line(tmp_path, wrong, says):
    plant(tmp_path, Planted("pre", loss=3.0))
    _swept(tmp_path, **wrong)
    with pytest.raises(UserError, match=rf"comparison\.json: {says}"):
        write_report(tmp_path)


def test_sweep_seeds_without_a_sweep_are_seeds(tmp_path):
    """The options of a comparison name sweep_seeds even where nothing is swept."""
    for scheme, loss in (("pre", 3.0), ("post", 3.25)):
        plant(tmp_path, Planted(scheme, seed=100, loss=loss))
    _swept(tmp_path, sweep=[])
    assert _page(tmp_path).table("Loss minus pre's, each")["post"][0]["difference"] == "+0.2500"


def test_p_values_are_corrected_for_the_number_of_labels(tmp_path):
    """Alone, post's p of 0.03 would tell it apart; among three labels it does not."""
    drawn = np.random.default_rng(0).normal(0, 0.01, size=(4, 4))
    noise = (drawn - drawn.mean(axis=1, keepdims=True)) / drawn.std(axis=1, ddof=1, keepdims=True)
    # The mean in units of the standard error is t: 20, 3.9 and 0.5 with 3 degrees of freedom.
    values = {"hybrid": -20.0, "post": 3.9, "span": 0.5}
    for seed in range(4):
        plant(tmp_path, Planted("pre", seed=seed, loss=3.0))
        for row, (scheme, t) in enumerate(values.items()):
            plant(tmp_path, Planted(scheme, seed=seed, loss=3.0 + 0.01 * (noise[row, seed] + t / 2)))
    page = _page(tmp_path)
    found = {label: rows[0] for label, rows in page.table("Loss minus pre's, each").items()}
    p = {label: 2 * significance.stats.t.sf(abs(t), 3) for label, t in values.items()}
    assert 0.025 < p["post"] < 0.05
    assert found["hybrid"]["reading"] == "better"
    assert found["hybrid"]["p (Holm)"] == f"{3 * p['hybrid']:.4f}"
    assert found["post"]["reading"] == "not told apart after Holm's correction"
    assert (found["post"]["p"], found["post"]["p (Holm)"]) == (f"{p['post']:.4f}", f"{2 * p['post']:.4f}")
    assert found["span"]["reading"] == "not told apart: the interval contains 0"
    power = page.table("What the number of seeds can tell")["span"][0]
    assert power == {
        "label": "span",
        "seeds": "4",
        "std. dev. of the differences": "0.0100",
        "seeds to tell 0.01 nats": "10",  # an effect of 1: G*Power's table
        "nats these seeds tell": f"{significance.told_difference(0.01, 4):.4f}",
    }


def test_more_than_ten_seeds_are_bootstrapped(tmp_path):
    differences = np.random.default_rng(3).exponential(0.02, 12)
    for seed, difference in enumerate(differences):
        plant(tmp_path, Planted("pre", seed=seed, loss=3.0))
        plant(tmp_path, Planted("post", seed=seed, loss=3.0 + float(difference)))
    page = _page(tmp_path)
    low, high = significance.bootstrap(3.0 + differences - 3.0).interval
    assert page.table("Loss minus pre's, each")["post"][0]["95 % interval"] == f"+{low:.4f} to +{high:.4f}"
    assert "those of a bootstrap of t (9,999 resamples), because there are more than 10 seeds" in page.text


def test_seeds_with_another_order_of_the_data_are_not_paired(tmp_path):
    """data_seed=1 and no data_seed are the same order for seed 1 only."""
    for seed in range(3):
        plant(tmp_path, Planted("pre", seed=seed, loss=3.0))
        plant(tmp_path, Planted("post", seed=seed, loss=3.5 + seed, overrides=("train.data_seed=1",)))
    (row,) = _page(tmp_path).table("Loss minus pre, data_seed=null's, each")["post, data_seed=1"]
    assert (row["seeds"], row["difference"]) == ("1 of 3", "+1.5000")


def test_seeds_that_recorded_another_beginning_are_not_paired(tmp_path):
    """Seed 0 began with other numbers on both sides, seed 1 read another first batch, seed 2 is a pair."""
    kernel = "0/attention/query/kernel (16, 2, 8)"
    alike = {"parameters": {kernel: [2.0, -1.0, 0.5]}, "batches": {"1": "a"}}
    others = ({**alike, "parameters": {kernel: [2.0, -1.1, 0.5]}}, {**alike, "batches": {"1": "b"}}, alike)
    for seed, record in enumerate(others):
        pre = plant(tmp_path, Planted("pre", seed=seed, loss=3.0))
        (pre / "pairing.json").write_text(json.dumps(alike))
        post = plant(tmp_path, Planted("post", seed=seed, loss=3.25 + seed))
        (post / "pairing.json").write_text(json.dumps(record))
    (row,) = _page(tmp_path).table("Loss minus pre's, each")["post"]
    assert (row["seeds"], row["difference"]) == ("1 of 3", "+2.2500")
