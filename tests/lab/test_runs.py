"""How the lab reads runs: what labels name, what ended how, and which directories are refused."""

import json
import re
import shutil

import jax.numpy as jnp
import pytest
from planted_runs import STEPS, Planted, plant

from hybridnorm_jax.config import plugins
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.runs import read_runs
from hybridnorm_jax.training.checkpoints import Checkpoints


def test_labels_name_what_differs_besides_scheme_rate_and_seed(tmp_path):
    plant(tmp_path, Planted("pre", loss=3.0, name="a"))
    # The width of a head follows from d_model and is not named; where the run lives does not matter.
    plant(tmp_path, Planted("pre", loss=2.9, name="b", overrides=("model.d_model=32", "run.dir=elsewhere")))
    plant(tmp_path, Planted("hybrid", loss=2.8, name="c", overrides=("optimizer.clip=null",)))
    labels = {run.name: run.label for run in read_runs(tmp_path)}
    assert labels == {
        "a": "pre, d_model=16, clip=1.0",
        "b": "pre, d_model=32, clip=1.0",
        "c": "hybrid, d_model=16, clip=null",
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.steps=50", "train.steps"),
        ("train.seq_len=32", "train.seq_len"),
        ("train.batch_size=8", "train.batch_size"),
        ("model.vocab_size=300", "model.vocab_size"),
        ("data.validation_fraction=0.1", "data.validation_fraction"),
        ("data.segment_ids=true", "data.segment_ids"),
        ("eval.batches=1", "eval.batches"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, override, key):
    plant(tmp_path, Planted(loss=3.0, name="one"))
    plant(tmp_path, Planted("post", loss=3.0, name="two", overrides=(override,)))
    with pytest.raises(UserError, match=rf"one and two differ in {re.escape(key)} \(.* and .*\)") as caught:
        read_runs(tmp_path)
    assert "\n" not in str(caught.value)


def test_reading_data_elsewhere_is_no_difference(tmp_path):
    plant(tmp_path, Planted(loss=3.0, name="one"))
    plant(tmp_path, Planted("post", loss=3.0, name="two", overrides=("data.cache_dir=x", "data.read_threads=1")))
    assert [run.label for run in read_runs(tmp_path)] == ["post", "pre"]


def test_other_training_sets_and_the_same_run_twice(tmp_path):
    plant(tmp_path, Planted(loss=3.0, name="one"))
    twin = plant(tmp_path, Planted(loss=3.1, name="two"))
    with pytest.raises(UserError, match=r"one and two are the same .pre, learning rate 0.001, seed 0."):
        read_runs(tmp_path)
    (twin / "result.json").write_text((twin / "result.json").read_text().replace("3200", "3300"))
    with pytest.raises(UserError, match=r"one and two differ in train_tokens \(3200 and 3300\)"):
        read_runs(tmp_path)


def test_other_files_of_the_same_size(tmp_path):
    for seed, digest in enumerate(("aa", "bb")):
        files = {"data.files": [{"name": "a.txt", "size": 3, "digest": digest}]}
        plant(tmp_path, Planted(loss=3.0, seed=seed, name=f"run{seed}", result={"data": files}))
    plant(tmp_path, Planted(loss=3.0, seed=2, name="run2"))  # by a version that did not say
    with pytest.raises(UserError, match=r"run0 and run1 differ in the files of data\.files: runs on different data"):
        read_runs(tmp_path)
    # A run without a result has a checkpoint that says it.
    told = json.loads((tmp_path / "run1/result.json").read_text())
    shutil.rmtree(tmp_path / "run1")
    run = plant(tmp_path, Planted(loss=3.0, seed=1, name="run1", finished=False))
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        saved = {"data_state": {"files": told["data"]["data.files"]}, "config_yaml": (run / "config.yaml").read_text()}
        checkpoints.save(STEPS, {"params": {"scale": jnp.ones(2)}}, **saved, wait=True)
    with pytest.raises(UserError, match=r"run0 and run1 differ in the files of data\.files"):
        read_runs(tmp_path)
    (tmp_path / "run1/result.json").write_text('{"status": "finished", "step": 1, "scores": {}, "data": [1]}')
    with pytest.raises(UserError, match=r"run1/result\.json: data: must map keys to files with a name, a size and"):
        read_runs(tmp_path)


def _set_digest(run, digest):
    """Say with which plugin, mine.py, a planted run was trained."""
    (run / "plugins").mkdir(exist_ok=True)
    (run / "plugins/used.json").write_text(json.dumps([{"name": "mine.py", "digest": digest}]))


def test_other_plugins(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_imported", {"mine.py": plugins.Plugin("mine.py", "aa")})
    with_it = ("run.plugins=[mine.py]",)
    one = plant(tmp_path, Planted(loss=3.0, seed=0, name="one", overrides=with_it))
    plant(tmp_path, Planted("post", loss=3.0, name="without"))
    _set_digest(one, "aa")
    assert len(read_runs(tmp_path)) == 2
    two = plant(tmp_path, Planted(loss=3.0, seed=1, name="two", overrides=with_it))
    assert len(read_runs(tmp_path)) == 3  # by a version that did not say
    _set_digest(two, "bb")
    with pytest.raises(UserError, match=r"one and two differ in the plugin mine\.py: what other plugins made cannot"):
        read_runs(tmp_path)
    shutil.rmtree(two)
    plant(tmp_path, Planted(loss=3.0, seed=1, name="two"))
    with pytest.raises(UserError, match=r"one and two differ in the plugin mine\.py"):
        read_runs(tmp_path)


def test_a_checkpoint_counts_and_not_what_was_written_into_config_yaml(tmp_path):
    run = plant(tmp_path, Planted("post", loss=3.0))
    file = run / "config.yaml"
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        state = {"params": {"scale": jnp.ones(2)}}
        checkpoints.save(STEPS, state, data_state={}, config_yaml=file.read_text(), wait=True)
    file.write_text(file.read_text().replace("scheme: post", "scheme: hybrid").replace("0.001", "0.5"))
    (found,) = read_runs(tmp_path)
    assert (found.label, found.rate) == ("post", 1e-3)
    shutil.rmtree(run / "checkpoints")
    (found,) = read_runs(tmp_path)
    assert (found.label, found.rate) == ("hybrid", 0.5)


def test_directories_without_runs(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"empty: a run is a subdirectory with a config.yaml"):
        read_runs(tmp_path)
    run = plant(tmp_path, Planted(loss=3.0))
    with pytest.raises(UserError, match="this is a run itself; name the directory above it"):
        read_runs(run)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.yaml", "model: {scheme: [", "not valid YAML"),
        ("config.yaml", "model: {scheme: no_such}", "no_such"),
        ("config.yaml", "- 1", "must hold keys and values"),
        ("result.json", '{"status": "finished"', "cannot be read as JSON"),
        ("result.json", "[]", "must hold a JSON object"),
        ("result.json", '{"status": "done", "step": 1, "scores": {}}', "status: must be finished or diverged"),
        ("result.json", '{"status": "finished", "step": "1", "scores": {}}', "step: must be an integer"),
        ("result.json", '{"status": "finished", "step": 1, "scores": {"v": 1.0}}', "scores: must map"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, says):
    run = plant(tmp_path, Planted(loss=3.0))
    (run / file).write_text(text)
    with pytest.raises(UserError) as caught:
        read_runs(tmp_path)
    assert str(run / file) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_lines_of_metrics_are_skipped_and_said_where_no_kill_explains_them(tmp_path, capsys):
    run = plant(tmp_path, Planted(loss=3.0))
    file = run / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 100, "tra')
    assert len(read_runs(tmp_path)[0].losses) == STEPS
    assert capsys.readouterr().err == ""
    file.write_text('{"st\n' + whole)
    assert len(read_runs(tmp_path)[0].losses) == STEPS
    assert "metrics.jsonl, line 1: not a JSON object with a step and numbers; skipped" in capsys.readouterr().err


def test_plain_runs_without_result_json(tmp_path):
    schemes = {"done": "pre", "killed": "post", "nothing": "hybrid", "nan": "span", "risen": "peri"}
    risen = [6.0 - 0.05 * step for step in range(50)] + [4.5] * 50
    for name, scheme in schemes.items():
        run = plant(tmp_path, Planted(scheme, loss=3.25, name=name, curve=risen if name == "risen" else None))
        (run / "result.json").unlink()
    metrics = (tmp_path / "done" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "killed" / "metrics.jsonl").write_text("\n".join(metrics[:-1]))
    (tmp_path / "nothing" / "metrics.jsonl").unlink()
    broken = json.dumps({"step": STEPS, "eval/validation/loss": None})
    (tmp_path / "nan" / "metrics.jsonl").write_text("\n".join([*metrics[:-1], broken]))
    runs = {run.name: run for run in read_runs(tmp_path)}
    assert {name: run.status for name, run in runs.items()} == {
        "done": "finished",
        "killed": "unfinished",
        "nothing": "unfinished",
        "nan": "diverged",
        "risen": "diverged",
    }
    assert runs["done"].scores == {"validation": 3.25}
    assert runs["nan"].diverged_at == STEPS
    assert runs["risen"].diverged_at == 50
    assert runs["risen"].scores == {}
    assert runs["nothing"].step is None


def test_what_could_not_be_measured_is_null(tmp_path):
    """Older logs do not say how long compiling took, and some programs have operations that cannot be counted."""
    plant(tmp_path, Planted("pre", loss=3.0, result={"compile_seconds": None, "flops_per_step": None}))
    (run,) = read_runs(tmp_path)
    assert run.operations is None
