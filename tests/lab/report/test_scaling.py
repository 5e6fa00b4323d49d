"""Scaling: which labels are sizes of one scheme, how they are counted, and the line through them."""

import math

import numpy as np
import pytest
from parsed_pages import Parsed
from planted_runs import Planted, plant
from scipy import stats

from hybridnorm_jax.lab.report import write_report
from hybridnorm_jax.lab.report.scaling import fit, parameters_without_embeddings
from hybridnorm_jax.model.config import ModelConfig

MINUS = "\N{MINUS SIGN}"
WIDTHS = (16, 32, 64)


def test_parameters_are_those_of_blocks_and_final_norm():
    """By hand: q, k, v and out 4 x 16 x 16, gate, up and down 3 x 16 x 48, two norms of 16; and the final norm."""
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 48}
    expected = 2 * (4 * 16 * 16 + 3 * 16 * 48 + 2 * 16) + 16
    for embeddings in ({"vocab_size": 257}, {"vocab_size": 9000, "tie_embeddings": True}):
        model = ModelConfig(scheme="pre", **sizes, **embeddings)
        assert parameters_without_embeddings(model) == expected
    learned = ModelConfig(scheme="pre", positions="learned", max_positions=64, **sizes)
    assert parameters_without_embeddings(learned) == expected


def test_the_line_is_that_of_scipy():
    x = np.array([17.0, 17, 18, 18, 19.5, 19.5])
    y = 4 - 0.1 * x + np.random.default_rng(0).normal(0, 0.02, 6)
    line, theirs = fit(x, y), stats.linregress(x, y)
    # Both are float64 and compute the same formula.
    assert line.slope == pytest.approx(theirs.slope, rel=1e-10)
    assert line.slope_error == pytest.approx(theirs.stderr, rel=1e-10)
    assert line.intercept == pytest.approx(theirs.intercept, rel=1e-10)
    assert fit(x[[0, 2]], y[[0, 2]]).slope_error is None


def _plant_sizes(directory, widths, scheme, losses, *overrides):
    for width, of_width in zip(widths, losses, strict=True):
        for seed, loss in enumerate(of_width):
            name = f"{scheme}-{width}-{seed}-{len(overrides)}"
            settings = (f"model.d_model={width}", *overrides)
            plant(directory, Planted(scheme, seed=seed, loss=loss, name=name, overrides=settings))


def test_three_sizes_get_a_line_and_two_get_none(tmp_path):
    losses = [(3.6, 3.62), (3.4, 3.44), (3.3, 3.31)]
    _plant_sizes(tmp_path, WIDTHS, "pre", losses)
    _plant_sizes(tmp_path, WIDTHS[:2], "hybrid", losses[:2])
    page = Parsed(write_report(tmp_path, "pre, d_model=16").read_text(encoding="utf-8"))
    models = [ModelConfig(scheme="pre", d_model=width, num_layers=3, num_heads=2) for width in WIDTHS]
    counts = [parameters_without_embeddings(model) for model in models]
    sizes = page.table("Loss by size")
    assert [row["parameters without embeddings"] for row in sizes["pre"]] == [f"{count:,}" for count in counts]
    assert [row["label"] for row in sizes["hybrid"]] == ["hybrid, d_model=16", "hybrid, d_model=32"]
    theirs = stats.linregress([math.log2(count) for count in counts], np.mean(losses, axis=1))
    slopes = page.table("Fitted lines")
    assert slopes.keys() == {"pre"}
    assert slopes["pre"][0]["b (nats per doubling)"] == f"{theirs.slope:+.4f}".replace("-", MINUS)
    assert slopes["pre"][0]["standard error of b"] == f"{theirs.stderr:.4f}"
    assert "No slope is fitted for hybrid: fewer than 3 sizes" in page.text
    assert (tmp_path / "figures" / "scaling.png").exists()


def test_labels_that_differ_in_more_than_size_are_no_family(tmp_path):
    _plant_sizes(tmp_path, (16, 32), "pre", [(3.6,), (3.4,)])
    _plant_sizes(tmp_path, (16, 32), "pre", [(3.7,), (3.5,)], "optimizer.clip=null")
    page = Parsed(write_report(tmp_path, "pre, d_model=16, clip=1.0").read_text(encoding="utf-8"))
    assert page.table("Loss by size").keys() == {"pre, clip=1.0", "pre, clip=null"}


def test_one_size_is_no_section(tmp_path):
    plant(tmp_path, Planted("pre", loss=3.0))
    assert not [name for name in Parsed(write_report(tmp_path).read_text(encoding="utf-8")).tables if "size" in name]
