"""Learning-rate sensitivity, from runs with planted losses."""

import math

import pytest
from parsed_pages import Parsed
from planted_runs import Planted, plant

from hybridnorm_jax.lab.groups import RunGroup
from hybridnorm_jax.lab.report import write_report
from hybridnorm_jax.lab.report.sensitivity import near, off_best, worst_within

pytestmark = pytest.mark.usefixtures("tables_alone")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """pre at 5e-4 to 8e-3, best at 2e-3; post only at two rates, of which it diverges at the larger one."""
    directory = tmp_path_factory.mktemp("rates")
    for rate, losses in {5e-4: (3.5, 3.7), 1.4e-3: (3.15, 3.25), 2e-3: (3.1, 3.2), 8e-3: (4.0, 4.1)}.items():
        for seed, loss in enumerate(losses):
            plant(directory, Planted("pre", rate=rate, seed=seed, loss=loss))
    # A third seed, only at the best rate, must not change the increase.
    plant(directory, Planted("pre", rate=2e-3, seed=2, loss=2.0))
    for seed in range(2):
        plant(directory, Planted("post", rate=1e-3, seed=seed, loss=3.3))
    plant(directory, Planted("post", rate=2e-3, seed=0, loss=3.9))
    plant(directory, Planted("post", rate=2e-3, seed=1, loss=None, diverged_at=60, curve=[5.0] * 60))
    return Parsed(write_report(directory).read_text(encoding="utf-8"))


def test_increases_are_those_of_the_same_seeds(page):
    (pre,) = page.table("Learning-rate sensitivity")["pre"]
    assert pre == {
        "label": "pre",
        "best rate": "0.002",
        "at 1/4 of it": "+0.4500",
        # sqrt(2) below the best is as near to a half as to the best itself; the page names it.
        "at 1/2": "+0.0500 at 0.0014",
        "at 2 times": "not run",
        "at 4 times": "+0.9000",
        "worst within a factor of 4": "+0.9000 at 0.008",
        "multiples tried": "0.25 to 4",
    }


def test_a_divergence_is_worse_than_any_loss(page):
    (post,) = page.table("Learning-rate sensitivity")["post"]
    assert (post["best rate"], post["at 2 times"], post["at 1/2"]) == ("0.001", "1 of 2 diverged", "not run")
    assert post["worst within a factor of 4"] == "1 of 2 diverged at 0.002"


def test_only_rates_within_the_square_root_of_two_stand_for_a_multiple():
    runs = {rate: RunGroup({0: rate}, {}, ()) for rate in (1.0, 1.3, 3.0, 5.0)}
    found = off_best(runs, 1.0)
    assert [each.rate for each in found] == [1.3, 3.0, 5.0]
    assert near(found, 2.0) is None  # 1.3 is a factor of 1.54 away, 3.0 one of 1.5
    assert near(found, 4.0).rate == 5.0
    assert near(found, 3.0 * math.sqrt(2)).rate == 5.0
    worst = worst_within(found, 1.0)
    assert (worst.rate, worst.increase) == (3.0, 2.0)
    assert near([], 2.0) is None
    assert worst_within([], 1.0) is None
