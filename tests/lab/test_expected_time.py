"""`hybridnorm lab plan` counts the runs of a comparison and adds up what it measured."""

import numpy as np
import pytest

from hybridnorm_jax.commands.main import main
from hybridnorm_jax.lab import expected_time
from hybridnorm_jax.lab.compare_options import comparison
from hybridnorm_jax.lab.expected_time import Expected, expected

SIZES = ["model.d_model=16", "model.num_heads=2", "model.mlp_dim=16", "model.num_layers=1", "model.vocab_size=61"]
TRAIN = ["train.steps=6", "train.batch_size=8", "train.seq_len=8", "optimizer.warmup_steps=0", "eval.batches=2"]

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def arguments(tmp_path):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    data = [f"data.files=[{tmp_path}/tokens.npy]", "data.source=tokens", "data.validation_fraction=0.5"]
    run = [f"run.dir={tmp_path}", "run.name=lab", "train.watch_every=3", "train.watch_sequences=1", "eval.every=4"]
    return ["schemes=[pre,post]", "seeds=[0,1]", *SIZES, *TRAIN, *data, *run]


def test_a_comparison_takes_its_runs_and_one_compilation():
    each = Expected("pre", runs=3, steps=10, step=0.5, evaluation=2, watch=1, evaluations=2, watches=4, compilation=7)
    assert each.total == 3 * (10 * 0.5 + 2 * 2 + 4 * 1) + 7


def test_runs_are_counted_and_nothing_is_trained(arguments, tmp_path, capsys, monkeypatch):
    """A call is given the time of one second."""
    monkeypatch.setattr(expected_time, "_timed", lambda call: (1.0, 0.0))
    assert main(["lab", "plan", *arguments, "sweep=[1e-3,2e-3,4e-3]"]) == 0
    told = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in told.splitlines() if line}
    assert lines["pre"][1:3] == lines["post"][1:3] == ["7", "6"]  # three rates and two between them, and two seeds
    assert "up to 2 rates more" in told
    assert "hybridnorm lab compare 'schemes=[pre,post]'" in told
    assert not (tmp_path / "lab").exists()
    assert main(["lab", "plan", *arguments, "sweeps=[1]"]) == 2
    assert "did you mean 'sweep'?" in capsys.readouterr().err


def test_what_is_measured_is_what_a_run_does(arguments):
    pre, post = expected(comparison([*arguments, "learning_rates=[1e-3,2e-3]"]))
    for each in (pre, post):
        assert (each.runs, each.steps, each.evaluations, each.watches) == (4, 6, 2, 3)
        assert min(each.step, each.evaluation, each.watch) > 0


def test_without_a_validation_set_nothing_is_evaluated(arguments):
    without = [*arguments, "data.validation_fraction=0", "schemes=[pre]", "train.watch_every=null"]
    (found,) = expected(comparison(without))
    assert (found.evaluation, found.watch, found.watches) == (0, 0, 0)


def test_windows_that_overlap_are_more_batches(arguments, monkeypatch):
    """A step forward of half a window doubles what is evaluated; a call is given the time of one second."""
    monkeypatch.setattr(expected_time, "_timed", lambda call: (1.0, 0.0))
    whole = [*arguments, "schemes=[pre]", "eval.batches=null", "eval.batch_size=8"]
    (once,), (twice,) = expected(comparison(whole)), expected(comparison([*whole, "eval.stride=4"]))
    assert twice.evaluation == pytest.approx(2 * once.evaluation, abs=1)
    assert once.evaluation > 5
