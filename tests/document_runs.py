"""Short runs on a few short documents: what they read, their configuration, how they crash, and what they leave."""

import dataclasses
from pathlib import Path

import numpy as np

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program

STEPS = 6


def write_documents(folder, *, count=24, words=40):
    """Files 0.txt, 1.txt, ... of random words, the same ones every time."""
    rng = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], words)))


def document_run(folder, name, model, **sections):
    """A RunConfig of six steps on the documents of a folder, which it writes.

    `sections` change keys of sections, such as train={"batch_size": 8}.
    """
    write_documents(folder)
    keys = {
        "run": {"name": name, "dir": str(folder / "runs")},
        "data": {
            "source": "text",
            "files": (str(folder / "*.txt"),),
            "validation_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": STEPS, "seq_len": 24, "log_every": 1},
        "eval": {"every": STEPS, "batches": 1},
    }
    default = RunConfig()
    changed = {
        section: dataclasses.replace(getattr(default, section), **(keys.get(section, {}) | sections.get(section, {})))
        for section in keys | sections
    }
    return dataclasses.replace(default, model=model, **changed)


def renamed(config, name):
    """The same run in another directory."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


class EndsAfter(Hook):
    """Raises an error after a step."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def after_step(self, run):
        if run.step == self.step:
            raise self.error


def final_state(config):
    """The state of the newest checkpoint, and what it says of the data."""
    with Checkpoints(Path(config.run.dir) / config.run.name / "checkpoints", keep=10) as checkpoints:
        return checkpoints.restore(Program(config).abstract_state)


def training_losses(directory):
    """(step, loss) of each record of a run's directory that has one."""
    return [(record["step"], record["train/loss"]) for record in read_records(directory) if "train/loss" in record]
