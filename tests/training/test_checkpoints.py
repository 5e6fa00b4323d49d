"""What was saved comes back bit for bit, on any mesh; what goes wrong is said in one line and harms nothing saved."""

import errno
import functools
import json
import logging
import os
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybridnorm_jax.training import checkpoints as checkpoints_module
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.step_directories import CheckpointError

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_mesh(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2, devices=devices)


def make_state(seed=0, mesh=None):
    """A state that fills every leaf with random numbers, matrices sharded over fsdp, the rest replicated."""
    shape = jax.eval_shape(
        lambda: {"dense": {"kernel": jnp.zeros((64, 24)), "scale": jnp.zeros(24, jnp.bfloat16)}, "b": jnp.zeros(8)}
    )
    shape = State(jax.ShapeDtypeStruct((), jnp.int32), shape, jax.eval_shape(OPTIMIZER.init, shape))
    rng = np.random.default_rng(seed)
    mesh = mesh or make_mesh(1, 1)

    def leaf(s):
        values = np.asarray(rng.integers(0, 99, s.shape) if s.dtype == np.int32 else rng.standard_normal(s.shape))
        return jax.device_put(values.astype(s.dtype), NamedSharding(mesh, P("fsdp") if len(s.shape) == 2 else P()))

    return jax.tree.map(leaf, shape)


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def assert_same(restored, saved):
    """Equal structure, types, dtypes and bits."""
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def save(checkpoints, step, state, *, wait=False):
    checkpoints.save(step, state, data_state={"next": step}, config_yaml=f"step: {step}\n", wait=wait)


@pytest.fixture
def saved(tmp_path):
    """(directory with complete checkpoints of steps 1 and 2, the state of step 2)."""
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        save(checkpoints, 1, make_state(1))
        save(checkpoints, 2, make_state(2))
    return tmp_path / "checkpoints", make_state(2)


@pytest.mark.parametrize("before", [(1, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("after", [(1, 1), (4, 2)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, before, after):
    state = make_state(mesh=make_mesh(*before))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 7, state)
        target = abstract(make_state(mesh=make_mesh(*after)))
        restored, data_state = checkpoints.restore(target)
    assert_same(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding
    assert data_state == {"next": 7}


@pytest.mark.parametrize("shape", [(1, 1), (1, 4)])
def test_the_state_may_be_donated_right_after_save(tmp_path, shape):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda leaf: leaf * 0 + 1, state)

    control = make_state(mesh=make_mesh(*shape))
    overwrite(control)
    assert control.params["b"].is_deleted()  # otherwise this test would not test donation

    state = make_state(mesh=make_mesh(*shape))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, state)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        restored, _ = checkpoints.restore(abstract(state))
    assert_same(restored, make_state())


def test_saves_in_quick_succession_all_happen_and_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 20, 1000000):
            save(checkpoints, step, make_state(step))
        checkpoints.wait()
        assert checkpoints.steps() == [20, 1000000]
        assert checkpoints.latest() == 1000000
        for step in (20, 1000000):
            assert_same(checkpoints.restore(abstract(make_state()), step)[0], make_state(step))
            assert checkpoints.read_config(step) == f"step: {step}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000020", "1000000"]


@pytest.mark.parametrize(("numbers", "parts"), [(2**18, 0), (2**20, 8)])
def test_replicas_share_the_writing_of_a_large_array_and_a_small_one_is_not_cut(numbers, parts, tmp_path, monkeypatch):
    """A program is compiled for each piece. Here pieces of half a MiB are worth it, and of 128 KiB are not."""
    cut, slice_in_dim = [], jax.lax.slice_in_dim
    monkeypatch.setattr(jax.lax, "slice_in_dim", lambda *given, **keys: cut.append(1) or slice_in_dim(*given, **keys))
    monkeypatch.setattr(checkpoints_module, "SMALLEST_PART", 2**19)
    array = jax.device_put(np.arange(numbers, dtype=np.float32), NamedSharding(make_mesh(8, 1), P()))
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        save(checkpoints, 1, {"array": array}, wait=True)
        restored, _ = checkpoints.restore(abstract({"array": array}))
    assert len(cut) == parts
    np.testing.assert_array_equal(restored["array"], array)


def test_saving_a_complete_step_again_changes_nothing(saved):
    directory, state = saved
    with Checkpoints(directory, keep=3) as checkpoints:
        save(checkpoints, 2, make_state(9), wait=True)
        assert_same(checkpoints.restore(abstract(state))[0], state)


def test_parameters_alone_are_read(saved):
    directory, state = saved

    def bytes_read():
        (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metric["values"][0]["value"]

    with Checkpoints(directory, keep=3) as checkpoints:
        start = bytes_read()
        params = checkpoints.restore_params(abstract(state.params))
        alone = bytes_read() - start
        checkpoints.restore(abstract(state))
        whole = bytes_read() - start - alone
    assert_same(params, state.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert alone < whole - 0.8 * size  # compressed a little


def test_nothing_there_yet(tmp_path):
    with Checkpoints(tmp_path / "none", keep=1) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest() is None
        with pytest.raises(CheckpointError, match=r"none: no complete checkpoint in it$"):
            checkpoints.restore(abstract(make_state()))
    assert not (tmp_path / "none").exists()


def test_a_step_that_is_not_there_is_named_with_those_that_are(saved):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 3; there are \[1, 2\]"):
        Checkpoints(saved[0], keep=1).restore(abstract(saved[1]), step=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dense: dense | {"more": jnp.zeros(3)}, "params/dense/more is nothing there, .* has float32[3]"),
        (lambda dense: {"kernel": dense["kernel"]}, "params/dense/scale is bfloat16[24] there, .* has nothing"),
        (
            lambda dense: dense | {"kernel": jnp.zeros((64, 25))},
            "params/dense/kernel is float32[64, 24] there, .* has float32[64, 25]",
        ),
        (
            lambda dense: dense | {"scale": jnp.zeros(24)},
            "params/dense/scale is bfloat16[24] there, .* has float32[24]",
        ),
    ],
)
def test_another_models_checkpoint_is_refused_by_its_first_different_leaf(saved, change, message):
    directory, state = saved
    params = abstract(state.params | {"dense": change(state.params["dense"])})
    message = f"{directory}/000002: a checkpoint of another model: {message}".replace("[", r"\[").replace("]", r"\]")
    checkpoints = Checkpoints(directory, keep=1)
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        checkpoints.restore(abstract(state)._replace(params=params))
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        checkpoints.restore_params(params)


def test_another_optimizer_is_refused(saved):
    state = abstract(saved[1])
    with pytest.raises(CheckpointError, match=r"opt_state/1/0/count is int32\[\] there, but this model has nothing"):
        Checkpoints(saved[0], keep=1).restore(state._replace(opt_state=()))


@pytest.fixture
def full_disk(monkeypatch):
    """From now on Orbax's thread runs out of space when it is about to finish a save; undone by .undo()."""
    rename = os.rename

    def fail(source, target):
        if "orbax-checkpoint-tmp" in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    return monkeypatch


@pytest.mark.parametrize("notice", ["save", "wait", "close"])
def test_no_space_while_saving_is_told_at_the_next_call_and_harms_nothing(saved, full_disk, notice):
    directory, state = saved
    checkpoints = Checkpoints(directory, keep=2)
    save(checkpoints, 3, make_state(3))
    message = f"^{directory}: saving step 3 failed: no space left on device; complete steps, unharmed: 1, 2$"
    with pytest.raises(CheckpointError, match=message):
        save(checkpoints, 4, make_state(4)) if notice == "save" else getattr(checkpoints, notice)()
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.restore(abstract(state))[0], state)


def test_a_failed_save_gives_its_space_back(saved, full_disk):
    directory, _ = saved
    with pytest.raises(CheckpointError):
        save(Checkpoints(directory, keep=2), 3, make_state(3), wait=True)
    assert sorted(path.name for path in directory.iterdir()) == ["000001", "000002"]


def test_no_space_as_tensorstore_reports_it(tmp_path, monkeypatch):
    # The text that TensorStore 0.1.86 raises on a full tmpfs.
    text = "RESOURCE_EXHAUSTED: Failed to write 17006592 bytes to file 14: No space left on device [os_error_code='28']"

    class Pending:
        def result(self):
            raise ValueError(text)

    monkeypatch.setattr(checkpoints_module.ocp, "save_checkpointables_async", lambda *args, **keys: Pending())
    with pytest.raises(CheckpointError, match=r"failed: no space left on device; complete steps, unharmed: none$"):
        save(Checkpoints(tmp_path, keep=1), 1, make_state(), wait=True)


def as_older_version(step):
    """Make of a step what the version without manifests would have saved."""
    shutil.rmtree(step / "manifest")
    file = step / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    del metadata["custom_metadata"]["manifest_parts"]
    file.write_text(json.dumps(metadata))


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# Orbax closes its event loop while TensorStore still has errors to deliver to it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda step: os.truncate(largest_file(step), largest_file(step).stat().st_size // 2),
        lambda step: (step / "state" / "manifest.ocdbt").unlink(),
        lambda step: os.truncate(step / "state" / "_METADATA", 50),
        lambda step: os.truncate(step / "_CHECKPOINT_METADATA", 50),
        lambda step: shutil.rmtree(step / "state"),
    ],
    ids=["data", "index", "tree", "metadata", "everything"],
)
def test_a_damaged_checkpoint_without_digests_is_named_and_the_one_before_it_is_usable(saved, damage):
    directory, state = saved
    as_older_version(directory / "000002")
    damage(directory / "000002")
    checkpoints = Checkpoints(directory, keep=1)
    with pytest.raises(CheckpointError, match=rf"^{directory}/000002: cannot be read \(.*\); .* move this dir[^\n]*$"):
        checkpoints.restore(abstract(state))
    assert_same(checkpoints.restore(abstract(state), step=1)[0], make_state(1))


def test_a_checkpoint_without_digests_is_used_with_a_warning_and_counts_as_any_other(saved, capfd):
    directory, state = saved
    for step in (1, 2):
        as_older_version(directory / f"{step:06d}")
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.usable() == 2
        assert_same(checkpoints.restore(abstract(state))[0], state)
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"{directory}/000002: saved by a version that wrote no digests; used without knowing")
        save(checkpoints, 3, make_state(3), wait=True)
        assert checkpoints.steps() == [2, 3]
        checkpoints.restore(abstract(state))
        assert capfd.readouterr().err == ""


def test_orbaxs_log_is_quiet_and_everybody_elses_is_not(saved, full_disk, caplog):
    caplog.set_level(logging.INFO)
    checkpoints = Checkpoints(saved[0], keep=2)
    checkpoints.restore(abstract(saved[1]))
    save(checkpoints, 3, make_state(3))
    logging.getLogger("absl").info("ours")
    with pytest.raises(CheckpointError):
        checkpoints.close()
    assert [record.getMessage() for record in caplog.records] == ["ours"]


def test_an_error_in_the_run_is_not_hidden_by_one_of_its_last_save(saved, full_disk):
    def run():
        with Checkpoints(saved[0], keep=2) as checkpoints:
            save(checkpoints, 3, make_state(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run()
    assert "saving step 3 failed: no space" in caught.value.__notes__[0]


def test_while_steps_are_skipped_the_checkpoint_before_them_is_kept(tmp_path):
    def save_after(checkpoints, step, skipped):
        checkpoints.save(step, make_state(step), data_state={}, config_yaml="", skipped_in_a_row=skipped, wait=True)
        return checkpoints.steps()

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            save_after(checkpoints, step, 0)
        assert save_after(checkpoints, 3, 0) == [2, 3]
        # Step 3 was the last that was made: its parameters, and those of 4 to 6, are the ones that fail.
        assert save_after(checkpoints, 4, 1) == [2, 3, 4]
        assert save_after(checkpoints, 5, 2) == [2, 4, 5]
        assert save_after(checkpoints, 6, 3) == [2, 5, 6]
        assert checkpoints.newest_good(before=3) == 2
        assert checkpoints.newest_good(before=2) is None
        assert save_after(checkpoints, 7, 0) == [6, 7]


def test_a_good_checkpoint_is_one_whose_files_are_as_they_were(saved):
    directory, _ = saved
    os.truncate(largest_file(directory / "000002"), 3)
    assert Checkpoints(directory, keep=2).newest_good(before=9) == 1


def test_what_fails_in_orbaxs_threads_is_one_line_with_the_step(tmp_path, monkeypatch):
    class Pending:
        def result(self):
            raise RuntimeError("barrier timed out")

    monkeypatch.setattr(checkpoints_module.ocp, "save_checkpointables_async", lambda *args, **keys: Pending())
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, make_state())
    with pytest.raises(CheckpointError, match=r"saving step 1 failed: barrier timed out; complete steps, .*: none$"):
        checkpoints.wait()
    checkpoints.wait()  # told once


def test_a_bucket_stays_a_bucket():
    assert (
        str(Checkpoints("gs://bucket/runs/name/checkpoints", keep=1).directory) == "gs://bucket/runs/name/checkpoints"
    )
