"""Runs on a mixture: resumed, on other meshes, branched, evaluated by source, and what is refused when files change."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from lettered_texts import TINY

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.data import open_data
from hybridnorm_jax.data.mixture import mixture_of, order_of
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program

MIXTURE = [
    *TINY,
    *("train.steps=8", "eval.every=8", "train.log_every=2", "optimizer.schedule=constant"),
    *("checkpoint.every=3", "checkpoint.keep=9", "data.validation_fraction=0.3"),
    *("data.mixture.a.files=[a.txt]", "data.mixture.b.files=[b.txt]", "data.mixture.a.weight=3"),
    "data.stages=[{at: 4, weights: {a: 1, b: 7}}]",
]

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def run(command):
    """Trains on the mixture; returns the one line of an error, or None."""
    return lambda *arguments: command("train", *MIXTURE, *arguments)


def final_state(name):
    """Parameters and moments of a run's newest checkpoint, and what it says of the data."""
    program = Program(parse([*MIXTURE, f"run.name={name}"]))
    with Checkpoints(epath.Path(f"runs/{name}/checkpoints"), keep=10) as checkpoints:
        state, data_state = checkpoints.restore(program.abstract_state)
    return jax.tree.leaves(state), data_state


def losses(name):
    return [loss for record in read_records(epath.Path(f"runs/{name}")) for loss in record.get("train/losses", [])]


def assert_same_end(one, other):
    (ours, our_data), (theirs, their_data) = final_state(one), final_state(other)
    for left, right in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(left, right)
    assert our_data == their_data
    assert losses(one) == losses(other)


def test_a_run_resumed_in_the_middle_of_a_stage_is_the_one_that_was_never_stopped(run):
    assert run("run.name=whole") is None
    assert run("run.name=parts", "train.steps=6") is None
    assert run("run.name=parts", "data.read_threads=3") is None
    assert_same_end("parts", "whole")
    assert final_state("whole")[1]["iterator"] == {"next_index": 8}
    # 8 rows a step: of a 3 in 4 for four steps, then 1 in 8.
    (last,) = [record for record in read_records(epath.Path("runs/whole")) if record.get("data/a/tokens") == 28 * 8]
    assert (last["step"], last["data/b/tokens"]) == (8, 36 * 8)
    scores = [record for record in read_records(epath.Path("runs/whole")) if "eval/a/loss" in record]
    sets = {"eval/a/loss", "eval/b/loss", "eval/validation/loss"}
    assert [(record["step"], set(record) - {"step"}) for record in scores] == [(8, sets)]
    mean = (28 * scores[0]["eval/a/loss"] + 36 * scores[0]["eval/b/loss"]) / 64
    assert scores[0]["eval/validation/loss"] == pytest.approx(mean, rel=1e-12)


def test_tokens_of_each_source_are_exact_where_rows_are_not_full(run):
    """In every line, also after the run went on with other devices."""
    padded = ["data.packing=padded", "train.seq_len=24", "train.log_every=1"]
    assert run("run.name=padded", "train.steps=5", *padded) is None
    assert run("run.name=padded", "mesh.data=2", "mesh.fsdp=4", *padded) is None
    config = parse([*MIXTURE, *padded, "run.name=padded"])
    data = open_data(config.data, seq_len=24, vocab_size=config.model.vocab_size, progress=False)
    mixture, order = mixture_of(config, data), order_of(config, data)
    held = {"a": 0, "b": 0}
    expected = []
    for step in range(8):
        for place in order.places(step * 8, step * 8 + 8, range(8)):
            name = "a" if place.rows is data.sources["a"].train else "b"
            held[name] += int((place.rows[place.index]["weights"] > 0).sum())
        expected.append((step + 1, held["a"], held["b"]))
    lines = [record for record in read_records(epath.Path("runs/padded")) if "data/a/tokens" in record]
    assert [(line["step"], line["data/a/tokens"], line["data/b/tokens"]) for line in lines] == expected
    means = [mixture.read_until(step)["a"].mean_tokens for step in range(1, 9)]
    assert means != [tokens for _, tokens, _ in expected]


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(("mesh.data=2", "mesh.fsdp=4"), marks=pytest.mark.long),
        ("train.grad_accumulation=4", "mesh.data=2", "mesh.tensor=4"),
    ],
    ids=" ".join,
)
def test_other_meshes_and_microbatches_read_the_same_rows(devices, run):
    """Sums in another order differ by rounding; another row would change the loss in its second digit."""
    assert run("run.name=one") is None
    assert run("run.name=other", *devices) is None
    np.testing.assert_allclose(losses("other"), losses("one"), rtol=1e-5)


def test_a_stage_may_change_until_it_begins(run):
    other = "data.stages=[{at: 7, weights: {b: 1}}]"
    assert run("run.name=run", "train.steps=6", "data.stages=[{at: 5, weights: {a: 1, b: 7}}]") is None
    line = run("run.name=run", other)
    assert line.startswith(
        "error: runs/run holds another run (data.stages: saved [{at: 5.0, weights: {a: 1.0, b: 7.0}}"
    )
    assert "but step 6 was made with other weights; only what a source weighs after step 6 may change" in line
    line = run("run.name=run", "data.stages=[{at: 5, weights: {a: 1, b: 7}}]", "data.mixture.a.weight=2")
    assert "data.mixture.a.weight: saved 3.0, asked 2.0, but step 1 was made with other weights" in line
    # What counts is the proportion, and a source that is new in a later stage is no other run.
    later = "data.stages=[{at: 5, weights: {a: 0.125, b: 0.875}}, {at: 7, weights: {c: 1}}]"
    assert run("run.name=run", later, "data.mixture.c.files=[c.txt]", "data.mixture.c.weight=0") is None
    (last,) = [record for record in read_records(epath.Path("runs/run")) if "data/c/tokens" in record]
    assert (last["step"], last["data/c/tokens"]) == (8, 8 * 8)


def test_a_stage_that_moves_with_the_number_of_steps_is_refused_once_it_was_made(run):
    stages = "data.stages=[{at: 0.5, weights: {b: 1}}]"
    assert run("run.name=run", "train.steps=6", stages) is None
    line = run("run.name=run", "train.steps=12", stages)
    assert "data.stages: begin at other steps, because train.steps is 12, saved 6, but step 4 was made with" in line


def test_a_branch_may_have_other_stages_from_its_step_on(run):
    assert run("run.name=trunk", "train.steps=6") is None
    branch = ("run.name=branch", "init_from=runs/trunk", "init_optimizer=true")
    line = run(*branch, "data.stages=[{at: 5, weights: {b: 1}}]")
    assert line.startswith("error: init_optimizer=true: a branch of runs/trunk needs the same data.stages: saved")
    annealing = "data.stages=[{at: 4, weights: {a: 1, b: 7}}, {at: 7, weights: {a: 1}}]"
    assert run(*branch, annealing) is None
    assert run("run.name=long", annealing) is None
    assert losses("branch") == losses("long")[6:]


def test_a_shard_that_changed_vanished_or_was_swapped_is_refused_with_its_source(run, tmp_path):
    assert run("run.name=run", "train.steps=6") is None
    before = (tmp_path / "b.txt").read_text()
    (tmp_path / "b.txt").write_text(before.replace("a", "b"))
    line = run("run.name=run")
    assert line.startswith("error: data.mixture.b.files: b.txt has another content than it had when step 6 was saved; ")
    (tmp_path / "b.txt").unlink()
    assert run("run.name=run") == "error: data.mixture.b.files: no such file: b.txt"
    (tmp_path / "b.txt").write_text(before)
    line = run("run.name=run", "data.mixture.a.files=[b.txt]", "data.mixture.b.files=[a.txt]")
    assert line.startswith("error: data.mixture.a.files: b.txt is read now in the place of a.txt")
    (tmp_path / "moved").mkdir()
    (tmp_path / "b.txt").rename(tmp_path / "moved" / "b.txt")
    assert run("run.name=run", "data.mixture.b.files=[moved/b.txt]") is None


def test_eval_scores_the_held_out_part_of_each_source(run, command, tmp_path):
    assert run("run.name=run") is None
    assert command("eval", "runs/run", "--json") is None
    scores = json.loads(command.out)["sets"]
    assert list(scores) == ["validation", "a", "b"]
    at_end = [record for record in read_records(epath.Path("runs/run")) if "eval/a/loss" in record][-1]
    assert scores["a"]["loss"] == pytest.approx(at_end["eval/a/loss"], rel=1e-5)
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "moved" / "a.txt")
    assert command("eval", "runs/run", "data.mixture.a.files=[moved/a.txt]") is None
    line = command("eval", "runs/run", "data.mixture.a.files=[c.txt]")
    assert line.startswith("error: data.mixture.a.files: saved [a.txt], asked [c.txt]: the held-out share of other")
    line = command("eval", "runs/run", "data.mixture.a.files=[moved/a.txt]", "data.validation.x=[b.txt]")
    assert line.startswith("error: data.validation.x: b.txt is trained on")


def test_what_a_source_was_trained_on_is_no_validation_of_a_later_run(run):
    assert run("run.name=first") is None
    again = ("run.name=second", "init_from=runs/first")
    line = run(*again, "data.validation_fraction=0.4")
    assert line.startswith(
        "error: data.validation_fraction: saved 0.3, asked 0.4: init_from=runs/first was trained on a."
    )
    line = run(*again, "data.mixture.b.files=[c.txt]", "data.validation.x=[b.txt]")
    assert line.startswith("error: data.validation.x: init_from=runs/first was trained on b.txt")
    assert run(*again) is None


def test_the_beginning_shows_a_table_of_the_sources(run, command):
    assert run("run.name=run", "data.mixture.b.epochs=9") is None
    lines = command.out.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("mixture "))
    rows = [line.split() for line in lines[place : place + 3]]
    assert rows[0] == ["mixture", "tokens", "from", "1", "from", "5", "epochs"]
    assert [row[0] for row in rows[1:]] == ["a", "b"]
    assert [row[2:4] for row in rows[1:]] == [["75.00%", "12.50%"], ["25.00%", "87.50%"]]
    assert rows[2][5:] == ["of", "at", "most", "9"]
    assert all(len(line) <= 80 for line in lines[place : place + 4])


def test_a_run_that_reads_a_source_too_often_ends_before_it_is_compiled(run, monkeypatch):
    monkeypatch.setattr(loop, "with_chosen_remat", lambda program: pytest.fail("something was compiled"))
    line = run("run.name=run", "data.mixture.b.epochs=0.01")
    assert line.startswith("error: data.mixture.b.epochs=0.01: at the end of training, step 8, the source is read ")
