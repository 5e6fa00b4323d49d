"""The same command on fewer or more devices: the same batch, more or fewer microbatches, the same numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from document_runs import STEPS, EndsAfter, document_run, renamed

from hybridnorm_jax.config.resume_keys import decides_trajectory
from hybridnorm_jax.config.run_config import TrainSection
from hybridnorm_jax.errors import REQUEUE, ConfigError, RunStopped
from hybridnorm_jax.mesh import device_mesh
from hybridnorm_jax.training import loop, program
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.microbatches import microbatches_of
from hybridnorm_jax.training.program import Program

# As in tests/mesh/test_processes.py: sums over devices and microbatches are taken in another order, in float32, and
# Adam divides by their size.
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 2e-6, 2e-5


@pytest.mark.parametrize(
    ("batch", "asked", "most", "parts", "expected"),
    [
        (64, 1, None, 8, 1),
        (64, 1, 8, 8, 1),  # a device has 8 anyway
        (64, 1, 8, 4, 2),
        (64, 1, 8, 2, 4),
        (64, 2, 8, 8, 2),  # never fewer than asked for
        (24, 1, 5, 2, 3),  # 12 a device: in 3 parts of 4, since no 5 divide 12
        (24, 1, 1, 2, 12),
        (14, 1, 3, 2, 7),  # 7 is prime
        (64, 1, 8, 5, 1),  # cannot be split: left to the check of the batch
        (8, 4, 1, 8, 4),  # the same, with what was asked for
    ],
)
def test_as_few_microbatches_as_the_limit_allows(batch, asked, most, parts, expected):
    train = TrainSection(batch_size=batch, grad_accumulation=asked, max_device_sequences=most)
    count, size = microbatches_of(train, parts)
    assert (count, size) == (expected, batch // expected)
    if most is not None and batch % (parts * asked) == 0:
        assert size // parts <= most


@pytest.fixture
def config(tmp_path, small_config):
    return document_run(
        tmp_path,
        "elastic",
        small_config(scheme="pre", vocab_size=257),
        data={"segment_ids": True},
        train={"batch_size": 16, "max_device_sequences": 2},
        mesh={"data": 1, "fsdp": -1},
    )


def _train_on(devices, config, monkeypatch, *, until=None):
    """Train on the first `devices` of this process's eight, up to a step or to the end."""

    def make(sizes):
        return device_mesh.make_mesh(sizes, jax.devices()[:devices])

    monkeypatch.setattr(program, "make_mesh", make)
    if until is None:
        loop.train(config)
        return
    # As a lost host ends the process; the loop saves what was made.
    with pytest.raises(RunStopped):
        loop.train(config, hooks=[EndsAfter(until, RunStopped(REQUEUE, ""))])


def _losses(config, tmp_path):
    records = read_records(tmp_path / "runs" / config.run.name)
    names = ("train/loss", "train/grad_norm", "eval/validation/loss", "eval/validation/tokens")
    return {(record["step"], name): record[name] for record in records for name in names if name in record}


def _params(config, tmp_path):
    with Checkpoints(tmp_path / "runs" / config.run.name / "checkpoints", keep=9) as checkpoints:
        return checkpoints.restore_params(Program(config).abstract_state.params)


def test_eight_then_four_then_two_devices_give_the_numbers_of_eight(config, tmp_path, monkeypatch, capsys):
    whole = renamed(config, "whole")
    _train_on(8, whole, monkeypatch)
    expected, params = _losses(whole, tmp_path), _params(whole, tmp_path)
    _train_on(8, config, monkeypatch, until=2)
    capsys.readouterr()
    _train_on(4, config, monkeypatch, until=4)
    four = capsys.readouterr()
    _train_on(2, config, monkeypatch)
    two = capsys.readouterr()
    assert "in 2 microbatches of 8, by train.max_device_sequences=2" in " ".join(four.out.split())
    assert (
        "note: the run was on 8 devices in 1 process (fsdp 8), 1 x 2 sequences a device; it goes on on "
        "4 devices in 1 process (fsdp 4), 2 x 2 sequences a device: a step is the same 16 sequences\n"
    ) in four.err
    assert "(fsdp 4), 2 x 2 sequences a device; it goes on on 2 devices" in two.err
    assert "(fsdp 2), 4 x 2 sequences a device: a step is the same 16 sequences\n" in two.err
    found = _losses(config, tmp_path)
    assert found.keys() == expected.keys()
    assert {step for step, name in found if name == "train/loss"} == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), [expected[key] for key in found], rtol=LOSS_TOLERANCE)
    pairs = zip(jax.tree.leaves(_params(config, tmp_path)), jax.tree.leaves(params), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=PARAMETER_TOLERANCE, rtol=0)


def test_without_the_key_nothing_changes_and_nothing_is_said_on_the_same_devices(config, tmp_path, monkeypatch, capsys):
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, max_device_sequences=None))
    _train_on(8, plain, monkeypatch, until=2)
    _train_on(8, plain, monkeypatch)
    told = capsys.readouterr()
    assert "note: the run was on" not in told.err
    assert "microbatches" not in told.out


@pytest.mark.long
def test_what_a_number_of_microbatches_changes_is_said(config, tmp_path, monkeypatch, capsys, small_config):
    model = small_config(vocab_size=257, num_experts=4, experts_per_token=2, dropout=0.1)
    experts = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, steps=2))
    _train_on(8, experts, monkeypatch, until=1)
    _train_on(4, experts, monkeypatch)
    assert (
        "a step is the same 16 sequences, but the experts' balance loss is taken over each microbatch "
        "(train.balance_loss) and each microbatch draws its own dropout (model.dropout)\n"
    ) in capsys.readouterr().err


def test_a_batch_that_the_devices_cannot_split_is_refused(config, monkeypatch):
    odd = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=12))
    with pytest.raises(ConfigError, match=r"12 sequences at a time, must be a multiple of .* = 8"):
        _train_on(8, odd, monkeypatch)


def test_the_limit_may_change_when_a_run_is_resumed():
    assert not decides_trajectory("train.max_device_sequences")
    assert decides_trajectory("train.grad_accumulation")
