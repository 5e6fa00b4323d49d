"""What lies in the directory of a run's checkpoints: steps, what killed saves left, and what is nobody's business."""

import shutil

import pytest
from test_checkpoints import abstract, assert_same, make_state, save

from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.step_directories import METADATA, CheckpointError, find_checkpoint


@pytest.fixture
def saved(tmp_path):
    """(directory with complete checkpoints of steps 1 and 2, the state of step 2)."""
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, make_state(step))
    return directory, make_state(2)


def test_the_leftover_of_a_killed_save_is_ignored_by_readers_and_removed_by_the_next_save(saved):
    directory, state = saved
    leftover = directory / "000003.orbax-checkpoint-tmp"
    shutil.copytree(directory / "000001", leftover)
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(abstract(state))[0], state)
        assert leftover.exists()  # to a reader it might be a save that is running
        save(checkpoints, 4, make_state(4))
    assert sorted(path.name for path in directory.iterdir()) == ["000002", "000004"]


def test_a_deletion_that_was_killed_leaves_no_step_behind(saved, monkeypatch):
    directory, _ = saved

    class KilledError(BaseException):
        pass

    def kill(path):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.gpath.PosixGPath.rmtree", kill)
        with pytest.raises(KilledError):
            save(Checkpoints(directory, keep=1), 3, make_state(3), wait=True)
    with Checkpoints(directory, keep=1) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        save(checkpoints, 4, make_state(4))
    assert [path.name for path in directory.iterdir()] == ["000004"]


def test_a_run_its_checkpoints_and_one_step_are_all_found(saved, monkeypatch):
    directory, state = saved
    assert find_checkpoint(directory.parent) == (directory, None)
    assert find_checkpoint(f"{directory}/") == (directory, None)
    assert find_checkpoint(directory / "000001") == (directory, 1)
    monkeypatch.chdir(directory.parent)
    found, step = find_checkpoint("checkpoints/000002")
    assert_same(Checkpoints(found, keep=1).restore_params(abstract(state.params), step), state.params)


def test_a_step_is_also_named_after_its_run(saved, monkeypatch):
    directory, _ = saved
    run = directory.parent
    assert find_checkpoint(f"{run}@2") == find_checkpoint(f"{run}@000002") == (directory, 2)
    monkeypatch.chdir(run.parent)
    assert find_checkpoint(f"{run.name}@1") == (directory, 1)
    with pytest.raises(CheckpointError, match=r"@3: .* has no checkpoint of step 3; there are 1, 2$"):
        find_checkpoint(f"{run}@3")
    with pytest.raises(CheckpointError, match=r"@1: .*000002 is one checkpoint already; name it without @1$"):
        find_checkpoint(f"{directory}/000002@1")
    (run.parent / "name@2").mkdir()  # a directory of just this name is what is meant
    with pytest.raises(CheckpointError, match=r"name@2: no complete checkpoint there"):
        find_checkpoint("name@2")


def test_a_number_that_no_step_can_have_is_part_of_a_name(saved):
    directory, state = saved
    for name in ("9" * 5000, "\u0663\u0663\u0663\u0663\u0663\u0663"):  # int() refuses the first and reads the second
        with pytest.raises(CheckpointError):
            find_checkpoint(f"{directory.parent}@{name}")
    shutil.copytree(directory / "000002", directory / "\u0663\u0663\u0663\u0663\u0663\u0663")
    shutil.copytree(directory / "000002", directory / ("9" * 30))
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(abstract(state))[0], state)


def test_a_reader_who_needs_a_step_hears_why_there_is_none_in_one_line(saved):
    directory, _ = saved
    leftover = directory / "000003.orbax-checkpoint-tmp"
    (directory / "000001").rename(leftover)
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.needed() == 2
        shutil.rmtree(directory / "000002")
        with pytest.raises(CheckpointError) as caught:
            checkpoints.needed()
    message = str(caught.value)
    assert message.startswith(f"{directory}: no complete checkpoint in it; {leftover}: a save that is running")
    assert "\n" not in message


def test_a_copy_that_is_not_whole_and_somebodys_directory_are_set_aside_and_not_deleted(saved):
    directory, _ = saved
    shutil.copytree(directory / "000002", directory / "000003", ignore=shutil.ignore_patterns("commit_*", "manifest"))
    (directory / "000090").mkdir()
    (directory / "000090/notes.txt").write_text("mine")
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        save(checkpoints, 4, make_state(4), wait=True)
    assert (directory / "000003.damaged/state").exists()
    assert (directory / "000090.damaged/notes.txt").read_text() == "mine"


def test_metadata_nested_deeper_than_python_reads_is_damage(saved):
    directory, _ = saved
    (directory / "000002" / METADATA).write_text("[" * 100_000)
    with Checkpoints(directory, keep=2) as checkpoints:
        glance = checkpoints.glance()
        assert glance.step in (None, 1)
        with pytest.raises(CheckpointError, match="000002"):
            checkpoints.usable()


def test_odd_names_beside_the_checkpoints_are_left_alone(saved):
    directory, state = saved
    odd = [".DS_Store", "000007", "0000002", "12", "000002.orig", "latest", "000009.damaged"]
    for name in odd:
        (directory / name).write_text("not ours")
    shutil.copytree(directory / "000002", directory / "0000008")
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.usable() == 2
        with pytest.raises(CheckpointError, match="0000008: no complete checkpoint there"):
            find_checkpoint(directory / "0000008")
        save(checkpoints, 7, make_state(7), wait=True)
        assert checkpoints.steps() == [2, 7]
        assert_same(checkpoints.restore(abstract(state))[0], make_state(7))
    left = {path.name for path in directory.iterdir()}
    assert left == {*odd, "0000008", "000002", "000007.damaged"}
    assert (directory / "000007.damaged").read_text() == "not ours"  # it was in the way


@pytest.mark.parametrize("place", ["missing", ".", "checkpoints/000003", "checkpoints/000004"])
def test_a_place_without_a_checkpoint_is_named(saved, monkeypatch, place):
    directory, _ = saved
    (directory / "000004").mkdir()
    monkeypatch.chdir(directory if place == "." else directory.parent)
    for step in (1, 2):
        shutil.rmtree(directory / f"{step:06d}")
    with pytest.raises(CheckpointError, match=r"no (such directory|complete checkpoint there); give a run's directory"):
        find_checkpoint(place)
