"""Loggers of a run: those that run.loggers names, a plugin's, and those that are given to hn.train."""

import json
import re

import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.config.yaml_files import from_yaml, to_yaml
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.loggers import logger_kinds

TINY = [
    *("model.d_model=16", "model.num_heads=2", "model.num_layers=1", "model.mlp_dim=16", "model.vocab_size=61"),
    "model.scheme=pre",
    *("train.batch_size=8", "train.seq_len=8", "train.log_every=1", "train.sample_tokens=0", "eval.batches=1"),
    *("data.source=tokens", "data.validation_fraction=0"),
]
PLUGIN = """
import json
import hybridnorm_jax as hn

@hn.logger_kind("lines")
class Lines(hn.Logger):
    def start(self, run):
        self.file = open(run.directory / "lines", "a")
        print(run.name, run.resume_step, len(run.history), file=self.file)
        return super().start(run)

    def write(self, step, values):
        print(step, sorted(values)[-1], file=self.file)

    def close(self, how):
        print(how, file=self.file)
        self.file.close()
"""

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def words(tmp_path, monkeypatch):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    monkeypatch.setattr(logger_kinds, "LOGGERS", logger_kinds.LOGGERS.copy())
    monkeypatch.setattr("hybridnorm_jax.config.run_config.LOGGERS", logger_kinds.LOGGERS)
    return [*TINY, f"data.files=[{tmp_path}/tokens.npy]", f"run.dir={tmp_path}", "run.name=run"]


class Given(hn.Logger):
    def __init__(self):
        self.steps, self.how = [], None

    def write(self, step, values):
        self.steps.append(step)

    def close(self, how):
        self.how = how


def test_a_plugins_logger_and_a_given_one_get_every_line_of_metrics(words, tmp_path):
    plugin, given = tmp_path / "plugin.py", Given()
    plugin.write_text(PLUGIN)
    words += [f"run.plugins=[{plugin}]", "run.loggers=[lines, csv]", "optimizer.schedule=constant"]
    hn.train(hn.parse([*words, "train.steps=2"]), loggers=[given])
    hn.train(hn.parse([*words, "train.steps=3"]))
    assert (tmp_path / "run/lines").read_text().splitlines() == [
        *("run None 0", "1 train/skipped_steps", "2 train/skipped_steps", "finished"),
        *("run 2 2", "3 train/skipped_steps", "finished"),
    ]
    assert given.steps == [1, 2]
    assert given.how == "finished"
    assert not (tmp_path / "run/tensorboard").exists()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", *(str(line["step"]) for line in lines)]


def test_what_is_no_logger_is_refused_at_once(words):
    with pytest.raises(UserError, match=r"^loggers: <class .*Given'> is no object of a subclass of Logger; make one"):
        hn.train(hn.parse(words), loggers=[Given])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.loggers=[tensorbord]", "run.loggers=tensorbord: not known; did you mean 'tensorboard'?"),
        ("run.loggers=[csv, csv]", "run.loggers=[csv, csv]: names csv twice"),
        ("run.project=", "run.project='': must not be empty"),
        ("run.mlflow_uri=http://me:secret@host", "run.mlflow_uri=...: must not hold a password; set MLFLOW_TRACKING"),
    ],
)
def test_bad_values(word, message, words):
    with pytest.raises(ConfigError, match=re.escape(message)):
        hn.parse([*words, word])


def test_configurations_of_before_are_read_as_what_they_mean(words):
    old = "run: {wandb: true, wandb_project: mine, wandb_group: lab}"
    section = from_yaml(old).run
    assert (section.loggers, section.project, section.group) == (("tensorboard", "wandb"), "mine", "lab")
    assert from_yaml("run: {wandb: false}").run.loggers == ("tensorboard",)
    assert from_yaml(old, ["run.wandb=false"]).run.loggers == ("tensorboard",)
    assert from_yaml(old, ["run.loggers=[csv]"]).run.loggers == ("csv",)
    assert hn.parse(["run.loggers=[csv]", "run.wandb=true"]).run.loggers == ("csv", "wandb")
    assert from_yaml(to_yaml(from_yaml(old))) == from_yaml(old)
    assert "wandb_project" not in to_yaml(from_yaml(old))
    with pytest.raises(ConfigError, match=r"run\.wandb=yes: expected true or false"):
        hn.parse(["run.wandb=yes"])


@pytest.mark.parametrize("name", ["csv", "two words", "", 3])
def test_a_plugins_logger_needs_a_name_of_its_own(name):
    with pytest.raises(ValueError, match="a logger is named"):
        hn.logger_kind(name)
    with pytest.raises(ValueError, match=r"the logger mine: .* is no subclass of hn\.Logger"):
        hn.logger_kind("mine")(int)
