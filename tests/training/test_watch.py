"""Watching a run shows its layers, and the run does not notice; series and spike scores hold every step."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.errors import ConfigError, RunStopped
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.spikes import SpikeScore
from hybridnorm_jax.training.stopping import StopSignals

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def config(tmp_path, small_config):
    """Seven steps over random tokens, shared by eight devices, saved at step 5."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16))
    default = RunConfig()
    return RunConfig(
        run=dataclasses.replace(default.run, name="plain", dir=str(tmp_path)),
        model=small_config(num_layers=2, scheme="hybrid_star"),
        data=dataclasses.replace(
            default.data, source="tokens", files=(str(tmp_path / "tokens.npy"),), validation_fraction=0.0
        ),
        train=TrainSection(7, 16, 8, log_every=3),
        checkpoint=dataclasses.replace(default.checkpoint, every=5),
    )


def _watched(config):
    train = dataclasses.replace(config.train, watch_every=3, watch_sequences=2)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name="watched"), train=train)


def _records(config, tmp_path):
    lines = (tmp_path / config.run.name / "metrics.jsonl").read_text().splitlines()
    timed = ("time/", "tokens_per_second", "mfu")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


def _state(config, tmp_path):
    with Checkpoints(tmp_path / config.run.name / "checkpoints", keep=2) as checkpoints:
        return checkpoints.restore(Program(config).abstract_state, None)[0]


@pytest.mark.long
def test_watching_does_not_change_the_trajectory_and_a_stopped_run_writes_the_same(config, tmp_path, monkeypatch):
    watched = _watched(config)
    loop.train(config)
    polls, poll = [], StopSignals.poll

    def stop_once(self):
        polls.append(1)
        if len(polls) == 5:  # before the fifth step
            raise RunStopped(75, "told to")
        poll(self)

    monkeypatch.setattr(StopSignals, "poll", stop_once)
    with pytest.raises(RunStopped, match="step 4 is saved"):
        loop.train(watched)
    loop.train(watched)

    for one, other in zip(*(jax.tree.leaves(_state(run, tmp_path)) for run in (config, watched)), strict=True):
        np.testing.assert_array_equal(one, other)
    plain, records = _records(config, tmp_path), _records(watched, tmp_path)
    lines = {record["step"]: record for record in records if "watch/stream_rms" in record}
    assert list(lines) == [1, 3, 6]
    assert {len(line["watch/gradient/block"]) for line in lines.values()} == {2}
    assert lines[3]["watch/parameter/block"] != lines[1]["watch/parameter/block"]

    # The stop at step 4 saved, and so wrote, the series in other pieces, and nothing else.
    def series(found):
        return [loss for record in found for loss in record.get("train/losses", ())]

    assert len(series(records)) == 7
    assert series(records) == series(plain)
    last = [record for record in records if "train/loss" in record][-1]
    assert last["train/loss_spike_score"] == plain[-1]["train/loss_spike_score"] == 0
    assert last["train/loss"] == last["train/losses"][-1]


def test_percentiles_are_those_of_the_steps_of_a_line(config, tmp_path):
    checkpoint = dataclasses.replace(config.checkpoint, every=100)
    loop.train(dataclasses.replace(config, checkpoint=checkpoint, model=config.model.with_scheme("pre")))
    lines = _records(config, tmp_path)
    assert [record["step"] for record in lines] == [3, 6, 7]
    for line in lines:
        assert line["train/grad_norm_p50"] == np.median(line["train/grad_norms"])
    assert [len(line["train/losses"]) for line in lines] == [3, 3, 1]


def test_more_sequences_than_a_device_has_are_refused(config):
    train = dataclasses.replace(config.train, watch_every=1, watch_sequences=3)
    with pytest.raises(ConfigError, match=r"train\.watch_sequences=3: must be at most 2, a device's share"):
        Program(dataclasses.replace(config, train=train))


def test_spikes_are_values_seven_deviations_from_those_before():
    score = SpikeScore()
    assert score.score is None
    for value in [1.0, 3.0] * 50:  # mean 2, deviation 1
        score.add(value)
    assert score.score == 0
    score.add(8.9)  # 6.9 deviations away
    assert score.score == 0
    score.add(12.0)
    assert score.score == pytest.approx(100 / 102)
    score.add(math.nan)
    assert score.score == pytest.approx(200 / 103)
    score.add(2.0)
    assert score.score == pytest.approx(200 / 104)
