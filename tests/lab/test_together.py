"""Runs that are trained at once end as they would one by one, and each leaves what a single run leaves."""

import dataclasses
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.errors import REQUEUE, ConfigError, RunStopped
from hybridnorm_jax.evaluation.perplexity import Score
from hybridnorm_jax.lab import run_files, together, trainer
from hybridnorm_jax.lab.compare_options import comparison
from hybridnorm_jax.lab.pairing import PairingRecord
from hybridnorm_jax.lab.runs import read_runs
from hybridnorm_jax.training import grouped_steps
from hybridnorm_jax.training.grouped_steps import GroupedSteps
from hybridnorm_jax.training.hooks.skipped_steps import DivergedError
from hybridnorm_jax.training.loop import train
from hybridnorm_jax.training.metrics_file import read_metrics, read_records
from hybridnorm_jax.training.shared_programs import SharedPrograms
from hybridnorm_jax.training.stopping import StopSignals

SMALL = [
    "schemes=[post]",
    "model.d_model=16",
    "model.num_heads=2",
    "model.mlp_dim=16",
    "model.num_layers=2",
    "model.dropout=0.1",
    "model.vocab_size=61",
    "train.steps=6",
    "train.batch_size=8",
    "train.seq_len=8",
    "train.log_every=4",
    "train.max_bad_steps=2",
    "train.watch_every=4",
    "train.watch_sequences=1",
    "checkpoint.every=3",
    "eval.every=4",
    "eval.batches=2",
    "optimizer.warmup_steps=2",
    "data.source=tokens",
    "data.validation_fraction=0",
]
# Of float32, whose sums XLA orders otherwise for several runs than for one.
ALIKE = 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random tokens to train on and to be scored on, as arguments."""
    directory = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("tokens", "held")):
        tokens = np.random.default_rng(seed).integers(0, 61, 2000)
        np.save(directory / f"{name}.npy", tokens.astype(np.uint16))
    return [f"data.files=[{directory}/tokens.npy]", f"data.validation.held=[{directory}/held.npy]"]


@pytest.fixture(scope="module")
def programs():
    """What is compiled, for all tests of this file."""
    return SharedPrograms()


def _configs(files, directory):
    """Three runs: two seeds at one rate, and one of them at another rate; all average their parameters."""
    keys = [f"run.dir={directory}", "run.name=lab", "seeds=[0,1]", "optimizer.ema_decay=0.5"]
    asked = comparison([*SMALL, *files, *keys])
    (contestant,) = asked.contestants
    runs = ((1e-3, 0), (1e-3, 1), (8e-3, 0))
    return [trainer.run_config(contestant, asked.directory, rate=rate, seed=seed) for rate, seed in runs]


@pytest.fixture(scope="module")
def alone(files, programs, tmp_path_factory):
    """The configurations of three runs that were trained one by one, and their scores."""
    configs = _configs(files, tmp_path_factory.mktemp("alone"))
    return configs, [train(config, hooks=[PairingRecord()], programs=programs) for config in configs]


@pytest.fixture(scope="module")
def grouped(files, programs, tmp_path_factory):
    """The same of runs that were trained at once."""
    configs = _configs(files, tmp_path_factory.mktemp("grouped"))
    return configs, together.train_together(configs, began=time.perf_counter(), programs=programs)


def _directory(config):
    return f"{config.run.dir}/{config.run.name}"


def _series(config):
    """(losses, gradient norms) of all steps."""
    records = read_records(_directory(config))
    return [point.value for point in run_files.losses(records)], [
        point.value for point in run_files.gradient_norms(records)
    ]


def _assert_alike(found, expected):
    """Relative to the norm of each array, as gradients and parameters are compared everywhere."""
    assert np.linalg.norm(np.asarray(found) - np.asarray(expected)) <= ALIKE * np.linalg.norm(expected)


def test_losses_gradients_scores_and_parameters_are_those_of_single_runs(alone, grouped):
    ends = []
    for one, of_group, scores, outcome in zip(alone[0], grouped[0], alone[1], grouped[1], strict=True):
        for found, expected in zip(_series(of_group), _series(one), strict=True):
            assert len(expected) == 6
            np.testing.assert_allclose(found, expected, rtol=ALIKE)
        assert outcome["held"].tokens == scores["held"].tokens
        assert outcome["held"].loss == pytest.approx(scores["held"].loss, rel=ALIKE)
        for plain in (False, True):
            config, params = hn.load_run(_directory(of_group), plain=plain)
            assert config == of_group
            expected = hn.load_run(_directory(one), plain=plain)[1]
            jax.tree.map(_assert_alike, params, expected)
        ends.append(outcome["held"].loss)
    # Otherwise the comparison could not tell the runs from one another.
    assert min(abs(first / second - 1) for first in ends for second in ends if first != second) > 100 * ALIKE
    assert len(set(ends)) == 3


def test_each_run_leaves_what_a_single_one_leaves(alone, grouped):
    for one, of_group in zip(alone[0], grouped[0], strict=True):
        ours, theirs = (read_records(_directory(config)) for config in (of_group, one))
        # A single run writes one line more where it is saved in between.
        theirs = [record for record in theirs if record["step"] != 3]
        assert [(record["step"], set(record)) for record in ours] == [
            (record["step"], set(record)) for record in theirs
        ]
        for found, expected in zip(ours, theirs, strict=True):
            for key in (key for key in expected if key.startswith(("watch/", "eval/"))):
                np.testing.assert_allclose(
                    np.asarray(found[key], float), np.asarray(expected[key], float), rtol=20 * ALIKE, err_msg=key
                )
        names = [{path.name for path in Path(_directory(config)).iterdir()} for config in (of_group, one)]
        assert names[0] == names[1]
        records = [json.loads(Path(_directory(c), "pairing.json").read_text()) for c in (of_group, one)]
        assert records[0] == records[1]


def test_a_run_that_diverges_disturbs_no_other(files, programs, grouped, tmp_path, monkeypatch):
    """The parameters that the second run begins with are NaN: its steps are skipped, and it ends after two."""
    original = GroupedSteps.joined

    def joined(self, states):
        broken = jax.tree.map(lambda leaf: leaf * jnp.nan, states[1].params)
        return original(self, [states[0], dataclasses.replace(states[1], params=broken), states[2]])

    monkeypatch.setattr(GroupedSteps, "joined", joined)
    configs = _configs(files, tmp_path)
    outcomes = together.train_together(configs, began=time.perf_counter(), programs=programs)
    assert isinstance(outcomes[1], DivergedError)
    assert outcomes[1].step == 2
    assert all(math.isnan(loss) for loss in _series(configs[1])[0])
    assert read_records(_directory(configs[1]))[-1]["step"] == 2
    for index in (0, 2):  # bit for bit
        assert outcomes[index] == grouped[1][index]
        assert _series(configs[index]) == _series(grouped[0][index])


@pytest.mark.long
def test_a_group_that_is_stopped_begins_again_and_one_that_ended_stays(files, programs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "SharedPrograms", lambda: programs)
    arguments = [*SMALL, *files, f"run.dir={tmp_path}", "run.name=lab", "seeds=[0,1,2]", "together=3"]
    polls, poll = [], StopSignals.poll

    def stop_after_four_steps(self):
        polls.append(self)
        if len(polls) == 5:  # in the evaluation after step 4
            raise RunStopped(REQUEUE, "nothing was to be saved")
        poll(self)

    with monkeypatch.context() as patched:
        patched.setattr(StopSignals, "poll", stop_after_four_steps)
        assert main(["lab", "compare", *arguments]) == REQUEUE
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if "stopped by" in line]
    assert "the 3 runs that are trained together are saved after their last step only and begin again" in line
    assert not list(tmp_path.glob("lab/*/result.json"))

    assert main(["lab", "compare", *arguments]) == 0
    capsys.readouterr()
    runs = read_runs(tmp_path / "lab")
    assert [(run.status, run.step, run.seed) for run in runs] == [("finished", 6, seed) for seed in range(3)]
    for run in runs:
        assert [len(run.losses), len(run.gradient_norms), len(run.watched)] == [6, 6, 2]
        assert [point.step for point in run.validation["held"]] == [4, 6]
        assert run.validation["held"][-1].value == run.scores["held"]
        assert (run.result["together"], run.result["resumed_from"]) == (3, 0)
        assert read_metrics(run.directory).superseded > 0

    monkeypatch.setattr(trainer, "train_together", lambda *_, **__: pytest.fail("nothing is left to train"))
    assert main(["lab", "compare", *arguments]) == 0
    assert capsys.readouterr().out.count("finished before") == 3


def test_a_sweep_asks_for_all_rates_of_its_grid_at_once(files, tmp_path, monkeypatch, capsys):
    """Training is replaced: the loss is lowest at 2e-3. A run with a checkpoint is trained alone."""
    groups, singles = [], []

    def score(config):
        directory = tmp_path / "lab" / config.run.name
        directory.mkdir(exist_ok=True)
        distance = abs(np.log2(config.optimizer.learning_rate / 2e-3))
        return {"held": Score(2.0 + distance, 1.0, None, 8)}

    def train_together(configs, **_):
        groups.append([(config.optimizer.learning_rate, config.train.seed) for config in configs])
        return [score(config) for config in configs]

    def train_alone(config, **_):
        singles.append((config.optimizer.learning_rate, config.train.seed))
        return score(config)

    monkeypatch.setattr(trainer, "train_together", train_together)
    monkeypatch.setattr(trainer, "train", train_alone)
    monkeypatch.setattr(trainer, "_is_new", lambda config: config.train.seed != 1)
    arguments = ["sweep=[1e-3,2e-3,4e-3]", "sweep_seeds=[100,101]", "seeds=[0,1,2,3]", "together=4"]
    arguments += [*SMALL, *files, f"run.dir={tmp_path}", "run.name=lab"]
    assert main(["lab", "compare", *arguments]) == 0
    assert groups == [
        [(1e-3, 100), (1e-3, 101), (2e-3, 100), (2e-3, 101)],
        [(4e-3, 100), (4e-3, 101)],
        [(1.41e-3, 100), (1.41e-3, 101), (2.83e-3, 100), (2.83e-3, 101)],
        [(2e-3, 0), (2e-3, 2), (2e-3, 3)],
    ]
    assert singles == [(2e-3, 1)]
    assert f"{'post':20}{0.002:>14g}" + f"{'2.0000':>14}" * 4 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("together=0", "together=0: must be at least 1"),
        ("init_from=runs/other", "init_from=runs/other: not with together=2; leave one of the two out"),
        ("eval.tasks=[arc_easy]", "eval.tasks=[...]: not with together=2"),
        ("eval.plain=true optimizer.ema_decay=0.9", "eval.plain=true: not with together=2"),
        ("train.profile=true", "train.profile=true: not with together=2"),
        ("run.wandb=true", "run.loggers=wandb: not with together=2"),
        ("train.sample_tokens=3", "train.sample_tokens=3: not with together=2"),
        ("model.remat=auto", "model.remat=auto: needs a policy that is named with together=2"),
    ],
)
def test_what_cannot_be_done_at_once_is_refused(argument, message, files, tmp_path, capsys):
    arguments = [*SMALL, *files, f"run.dir={tmp_path}", "together=2", *argument.split()]
    assert main(["lab", "compare", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(alone, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    together.check_can_be_together(alone[0][0], 1)
    with pytest.raises(ConfigError, match=r"^together=2: one process trains them; this run has several$"):
        together.check_can_be_together(alone[0][0], 2)


def test_the_numbers_of_runs_stay_weakly_typed(alone, programs):
    """A float32 rate would make updates of bfloat16 parameters float32, which those of a single run are not."""
    numbers = [programs.program(config).numbers for config in alone[0]]
    stacked = jax.jit(grouped_steps._stacked)(numbers)
    assert (stacked.peak.weak_type, stacked.peak.shape) == (True, (3,))
    np.testing.assert_allclose(stacked.peak, [1e-3, 1e-3, 8e-3], rtol=1e-6)
