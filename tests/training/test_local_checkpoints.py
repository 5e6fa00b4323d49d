"""Checkpoints on the hosts' own disks: what is left of them after a crash is put together, or passed over."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.training import local_checkpoints, loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.local_checkpoints import LocalCheckpoints
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program

STEPS = 6
pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def config(tmp_path, small_config):
    """Six steps; every second one is kept locally, and none but the last in the run's directory."""
    rng = np.random.default_rng(0)
    for number in range(24):
        (tmp_path / f"{number}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], 40)))
    default = RunConfig()
    return RunConfig(
        run=dataclasses.replace(default.run, name="killed", dir=str(tmp_path / "runs")),
        model=small_config(vocab_size=257, num_layers=1),
        data=dataclasses.replace(
            default.data,
            source="text",
            files=(str(tmp_path / "*.txt"),),
            validation_fraction=0.2,
            cache_dir=str(tmp_path / "cache"),
        ),
        train=dataclasses.replace(default.train, steps=STEPS, batch_size=8, seq_len=24, log_every=1),
        mesh=dataclasses.replace(default.mesh, data=2, fsdp=4),
        checkpoint=dataclasses.replace(default.checkpoint, local_dir=str(tmp_path / "disk"), local_every=2),
        eval=dataclasses.replace(default.eval, every=STEPS, batches=1),
    )


class _CrashError(Exception):
    """Stands for a host that is gone from one moment to the next."""


class _CrashAfter(Hook):
    def __init__(self, step):
        self.step = step

    def after_step(self, run):
        if run.step == self.step:
            raise _CrashError


def _crash(config, step):
    with pytest.raises(_CrashError):
        loop.train(config, hooks=[_CrashAfter(step)])


def _named(config, name):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


def _final_state(config):
    with Checkpoints(Path(config.run.dir) / config.run.name / "checkpoints", keep=9) as checkpoints:
        return checkpoints.restore(Program(config).abstract_state)


def _losses(config):
    records = read_records(Path(config.run.dir) / config.run.name)
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def _folders(config):
    """The newest first."""
    (run,) = Path(config.checkpoint.local_dir).glob(f"{config.run.name}-*")
    return sorted(run.iterdir(), reverse=True)


def _change_a_byte(folder):
    file = folder / "0-of-1/arrays.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_run_that_crashed_goes_on_from_the_local_step_bit_for_bit(config, capsys):
    whole = _named(config, "whole")
    loop.train(whole)
    _crash(config, 5)
    assert not (Path(config.run.dir) / "killed/checkpoints").exists()
    capsys.readouterr()
    loop.train(config)
    told = capsys.readouterr()
    assert "note: goes on after step 4, from the hosts' own disks (checkpoint.local_dir)\n" in told.err
    assert "goes on after step 4 of 6" in " ".join(told.out.split())
    assert _losses(config) == _losses(whole)
    assert [step for step, _ in _losses(config)] == list(range(1, STEPS + 1))
    (ours, ours_of_data), (theirs, theirs_of_data) = _final_state(config), _final_state(whole)
    assert ours_of_data == theirs_of_data
    for (path, left), right in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))


def test_a_newer_step_of_the_run_directory_wins(config, capsys):
    every = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=3))
    _crash(every, 3)  # 2 is kept locally, 3 in the run's directory
    capsys.readouterr()
    loop.train(every)
    told = capsys.readouterr()
    assert "hosts' own disks" not in told.err
    assert "goes on after step 3 of 6" in " ".join(told.out.split())


def test_a_damaged_block_is_found_by_its_digest_and_the_step_before_is_taken(config, capsys):
    _crash(config, 5)
    _change_a_byte(_folders(config)[0])
    capsys.readouterr()
    _crash(config, 3)
    errors = capsys.readouterr().err
    assert "000004-" in errors
    assert "is not as it was written; not used" in errors
    assert "note: step 4 of checkpoint.local_dir is passed over: no host has all of " in errors
    assert "note: goes on after step 2, from the hosts' own disks" in errors


def test_a_truncated_index_and_a_half_written_part_are_passed_over(config, capsys):
    _crash(config, 5)
    newest, older = _folders(config)
    (newest / "0-of-1/index.json").write_text("{")
    (older / "0-of-1").rename(older / "0-of-1.partial-01234567")
    capsys.readouterr()
    loop.train(config)
    errors = capsys.readouterr().err
    assert "cannot be read (index.json is not as it was written); not used" in errors
    assert "hosts' own disks" not in errors
    assert not list(Path(config.checkpoint.local_dir).rglob("*.partial*"))


def test_a_run_that_began_anew_does_not_take_the_steps_of_its_namesake(config, capsys):
    _crash(config, 5)
    shutil.rmtree(Path(config.run.dir) / "killed")
    capsys.readouterr()
    _crash(config, 1)
    assert "hosts' own disks" not in capsys.readouterr().err


def test_a_local_step_of_other_keys_is_refused(config):
    _crash(config, 5)
    # Without checkpoints and metrics nothing else would know.
    (Path(config.run.dir) / "killed/metrics.jsonl").unlink()
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, b1=0.5))
    with pytest.raises(ConfigError, match=r"checkpoint.local_dir holds another run \(optimizer.b1: saved 0.9"):
        loop.train(other)


def test_old_steps_are_deleted(config):
    often = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, local_every=1))
    _crash(often, 2)
    first = {folder.name for folder in _folders(often)}
    assert len(first) == 2
    _crash(often, 5)  # goes on after 2; the third step that it keeps takes those of the first start away
    assert [folder.name[:6] for folder in _folders(often)] == ["000005", "000004"]
    assert not first & {folder.name for folder in _folders(often)}


def test_a_full_local_disk_stops_no_run(config, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_checkpoints, "write_part", full)
    loop.train(config)
    assert "0-of-1: was not written: No space left on device; the run goes on\n" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made_is_refused_at_the_start(config, tmp_path):
    (tmp_path / "file").write_text("")
    there = dataclasses.replace(config.checkpoint, local_dir=str(tmp_path / "file/disk"))
    with pytest.raises(UserError, match=r"checkpoint\.local_dir=.*file/disk: cannot be written to: Not a directory"):
        loop.train(dataclasses.replace(config, checkpoint=there))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint.local_dir=/local"], r"goes with checkpoint\.local_every; give both or neither"),
        (["checkpoint.local_every=5"], r"goes with checkpoint\.local_every; give both or neither"),
        (["checkpoint.local_dir=gs://x", "checkpoint.local_every=5"], "must be a directory on each host's own disk"),
    ],
    ids=str,
)
def test_wrong_keys_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


SPECS = [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec("fsdp", "tensor"), PartitionSpec()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_blocks_of_one_mesh_are_put_together_on_another(dtype, tmp_path):
    before, after = make_mesh({"fsdp": 4, "tensor": 2}), make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    values = np.arange(16 * 8).reshape(16, 8).astype(dtype)
    saved = {
        f"{number}": jax.device_put(values + number, NamedSharding(before, spec)) for number, spec in enumerate(SPECS)
    }
    saved["scalar"] = jax.device_put(np.asarray(7, dtype), NamedSharding(before, PartitionSpec()))
    saved["empty"] = jax.device_put(np.zeros((0, 8), dtype), NamedSharding(before, PartitionSpec()))
    with LocalCheckpoints(str(tmp_path), run="a-b") as local:
        local.save(3, saved, {"said": 1})
    specs = [*reversed(SPECS), PartitionSpec(), PartitionSpec()]
    wanted = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(after, spec))
        for (name, array), spec in zip(saved.items(), specs, strict=True)
    }
    with LocalCheckpoints(str(tmp_path), run="a-b") as local:
        found = local.newest(wanted, after=0)
        assert local.newest(wanted, after=3) is None
    assert (found.step, found.facts) == (3, {"said": 1})
    for name, array in saved.items():
        assert found.state[name].sharding == wanted[name].sharding
        np.testing.assert_array_equal(found.state[name], array)
