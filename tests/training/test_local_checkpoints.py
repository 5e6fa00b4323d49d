"""Checkpoints on the hosts' own disks: what is left of them after a crash is put together, or passed over."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from bitwise import assert_bitwise
from document_runs import STEPS, EndsAfter, document_run, final_state, renamed, training_losses
from jax.sharding import NamedSharding, PartitionSpec

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.training import local_checkpoints, loop
from hybridnorm_jax.training.local_checkpoints import LocalCheckpoints

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def config(tmp_path, small_config):
    """Six steps; every second one is kept locally, and none but the last in the run's directory."""
    return document_run(
        tmp_path,
        "killed",
        small_config(scheme="pre", vocab_size=257, num_layers=1),
        train={"batch_size": 8},
        mesh={"data": 2, "fsdp": 4},
        checkpoint={"local_dir": str(tmp_path / "disk"), "local_every": 2},
    )


class _CrashError(Exception):
    """Stands for a host that is gone from one moment to the next."""


def _crash(config, step):
    with pytest.raises(_CrashError):
        loop.train(config, hooks=[EndsAfter(step, _CrashError())])


def _losses(config):
    return training_losses(Path(config.run.dir) / config.run.name)


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
    whole = renamed(config, "whole")
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
    (ours, ours_of_data), (theirs, theirs_of_data) = final_state(config), final_state(whole)
    assert ours_of_data == theirs_of_data
    assert_bitwise(ours, theirs)


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
