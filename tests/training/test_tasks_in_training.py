"""`eval.tasks`: tasks are scored on the way of a run, and what is wrong with them is said before it begins."""

import dataclasses
import json
import os
import signal
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from task_models import TASKS, run_config, texts, write_tokenizer

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.run_config import RunSection
from hybridnorm_jax.evaluation.token_scores import TokenScorer
from hybridnorm_jax.training.metrics_file import read_records

STEPS = 4


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Makes the configuration of a run of four steps that scores a task after every second one; nothing is held out."""
    monkeypatch.chdir(TASKS)
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "texts.txt").write_text("\n".join(texts()))

    def make(*tasks, name="run"):
        config = run_config(tmp_path / "tokenizer.json", batch_size=8)
        data = dataclasses.replace(
            config.data, files=(f"{tmp_path}/texts.txt",), validation_fraction=0.0, cache_dir=f"{tmp_path}/cache"
        )
        return dataclasses.replace(
            config,
            run=RunSection(name=name, dir=str(tmp_path / "runs")),
            data=data,
            train=dataclasses.replace(config.train, steps=STEPS, seq_len=32),
            checkpoint=dataclasses.replace(config.checkpoint, every=2),
            eval=dataclasses.replace(config.eval, every=2, tasks=tasks, task_limit=3),
        )

    return make


def _task_lines(tmp_path, name="run"):
    records = read_records(tmp_path / "runs" / name)
    return {
        record["step"]: {key: value for key, value in record.items() if key.startswith("eval/task/")}
        for record in records
        if any(key.startswith("eval/task/") for key in record)
    }


def test_tasks_are_scored_on_the_way_and_as_the_command_scores_them(config, tmp_path, capfd):
    pytest.importorskip("lm_eval")
    hn.train(config("colours.yaml"))
    lines = _task_lines(tmp_path)
    assert list(lines) == [2, STEPS]
    assert lines[2].keys() == {"eval/task/local_colours/acc", "eval/task/local_colours/acc_norm"}
    printed = capfd.readouterr()
    assert "step 2: tasks local_colours/acc " in printed.out
    assert f"Tasks after step {STEPS}" in printed.out
    assert main(["eval", f"{tmp_path}/runs/run", "--tasks", "colours.yaml", "--limit", "3", "--json"]) == 0
    score = json.loads(capfd.readouterr().out)["tasks"]["local_colours"]
    assert {f"eval/task/local_colours/{name}": score[name] for name in ("acc", "acc_norm")} == lines[STEPS]


def test_a_run_that_is_stopped_in_a_task_scores_it_when_it_goes_on(config, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    run, batches = TokenScorer._run, []

    def run_and_stop(self, params, batch):
        batches.append(batch)
        os.kill(os.getpid(), signal.SIGTERM)
        return run(self, params, batch)

    monkeypatch.setattr(TokenScorer, "_run", run_and_stop)
    with pytest.raises(hn.RunStopped):
        hn.train(config("colours.yaml", "pages.yaml"))
    assert len(batches) == 1  # before the second one it stops
    assert _task_lines(tmp_path) == {}
    monkeypatch.setattr(TokenScorer, "_run", run)
    hn.train(config("colours.yaml"))
    assert list(_task_lines(tmp_path)) == [2, STEPS]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["nowhere/"], "eval.tasks: nowhere/: no such file or folder"),
        (["counting.yaml"], "local_counting: max_gen_toks=24: must be below the 20 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_written(tasks, message, config, tmp_path):
    pytest.importorskip("lm_eval")
    asked = config(*tasks)
    asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, seq_len=20))
    with pytest.raises(hn.UserError, match=message):
        hn.train(asked)
    assert not (tmp_path / "runs" / "run").exists()


def test_the_harness_must_be_installed(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(hn.UserError, match=r"^eval.tasks: needs the extra `eval`"):
        hn.train(config("colours.yaml"))
    assert not (tmp_path / "runs" / "run").exists()


def test_a_limit_without_tasks_is_refused(config):
    with pytest.raises(hn.ConfigError, match=r"eval.task_limit=3: needs eval.tasks"):
        config()
