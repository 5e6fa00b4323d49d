"""A checkpoint that is not as it was written is named before it is used, whichever of its files was damaged."""

import errno
import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from etils import epath
from test_checkpoints import abstract, assert_same, make_state, save

from hybridnorm_jax.training import manifest
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.step_directories import CheckpointError, find_checkpoint

FILES = {
    "mark": b"done",
    "empty": b"",
    "state/index": b"of everything",
    "state/d/0a": b"0123456789",
    "state/d/0b": b"x",
}


class KilledError(BaseException):
    """Stands for a process that ends without a word."""


def killed(*args, **keys):
    raise KilledError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A directory of FILES; hashed in pieces of four bytes."""
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 4)
    for name, content in FILES.items():
        (tmp_path / "step" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "step" / name).write_bytes(content)
    return tmp_path / "step"


def write_all(directory, count):
    for index in range(count):
        manifest.write_part(directory, index=index, count=count)


def flip(file, bit):
    """Turn one bit of a file over."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def all_files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_parts_of_all_processes_make_a_manifest_in_any_order(tree, count):
    for index in reversed(range(count)):
        assert not manifest.is_complete(tree)
        manifest.write_part(tree, index=index, count=count)
    assert manifest.is_complete(tree)
    parts = [json.loads(manifest.part_path(tree, index, count).read_text())["files"] for index in range(count)]
    assert sorted(name for part in parts for name in part) == sorted(FILES)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for others in (1, 3):
        for index in range(others):
            assert manifest.find_damage(tree, index=index, count=others) is None


def test_every_bit_of_every_file_is_watched_by_exactly_one_process(tree):
    write_all(tree, 2)
    for name, content in FILES.items():
        for bit in range(8 * len(content)):
            flip(tree / name, bit)
            found = [manifest.find_damage(tree, index=index, count=3) for index in range(3)]
            assert [line for line in found if line] == [f"{name}: its digest is not the manifest's: damaged"]
            flip(tree / name, bit)


def test_every_byte_of_the_manifest_itself_is_watched(tree):
    write_all(tree, 2)
    part = tree / "manifest/1-of-2.json"
    for byte in range(part.stat().st_size):
        flip(part, 8 * byte + byte % 7)
        line = manifest.find_damage(tree, index=byte % 2, count=2)
        assert line == "manifest/1-of-2.json: is not as it was written: damaged"
        flip(part, 8 * byte + byte % 7)
    assert manifest.find_damage(tree, index=0, count=1) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda step: os.truncate(step / "state/d/0a", 3), "state/d/0a: has 3 bytes, but 10 in .*: truncated"),
        (lambda step: (step / "empty").write_bytes(b"no"), "empty: has 2 bytes, but 0 in .*: damaged"),
        (lambda step: (step / "empty").unlink(), "empty: is missing"),
        (lambda step: shutil.rmtree(step / "state"), "state/d/0a: is missing"),
        (
            lambda step: ((step / "state/index").unlink(), (step / "state/index").symlink_to("/etc/passwd")),
            "state/index: is a link out of the checkpoint, which is not followed; copy the file itself there",
        ),
        (lambda step: (step / "state/up").symlink_to("../../step/../.."), "state/up: is a link out of .*"),
        (lambda step: ((step / "empty").unlink(), os.mkfifo(step / "empty")), "empty: is no file"),
        (
            lambda step: os.truncate(step / "manifest/0-of-1.json", 9),
            "manifest/0-of-1.json: is not as it was written.*",
        ),
        (lambda step: (step / "manifest/0-of-1.json").write_text("[]"), "manifest/0-of-1.json: is not as it was.*"),
        (lambda step: shutil.rmtree(step), "cannot be listed: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_of_which_file(tree, damage, message):
    write_all(tree, 1)
    damage(tree)
    assert re.fullmatch(message, manifest.find_damage(tree, index=0, count=1))


FOREIGN = (".DS_Store", "state/._index", "state/.nfs0001", "Thumbs.db", "state/d/0a~", ".0a.swp", "lost+found/x")


def test_files_that_no_part_names_are_passed_over(tree):
    """Whether they came before the manifest was written, and go afterwards, or come later."""
    for name in FOREIGN:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("not ours")
    write_all(tree, 2)
    for name in FOREIGN:
        (tree / name).unlink()
    assert manifest.find_damage(tree, index=0, count=1) is None
    for name in (*FOREIGN, "notes.txt", "state/d/0c", "manifest/notes", "manifest/.DS_Store"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("not ours")
    (tree / "state/again").symlink_to("../state")  # leads to where it is
    manifest.part_path(tree, 1, 3).write_text("of another manifest")
    assert manifest.is_complete(tree)
    assert manifest.find_damage(tree, index=0, count=1) is None


def test_a_manifest_that_lists_foreign_files_is_read_without_them(tree):
    """As an earlier version wrote it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "FOREIGN", re.compile("nothing"))
        (tree / "state/.nfs0001").write_text("not ours")
        write_all(tree, 1)
    (tree / "state/.nfs0001").unlink()
    assert manifest.find_damage(tree, index=0, count=1) is None


def test_a_file_that_cannot_be_read_is_named(tree, monkeypatch):
    write_all(tree, 1)

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(manifest, "_entry", fail)
    assert manifest.find_damage(tree, index=0, count=1) == "empty: cannot be read: Input/output error"


def test_a_part_is_written_whole_or_not_at_all(tree, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.gpath.PosixGPath.replace", killed)
        with pytest.raises(KilledError):
            manifest.write_part(tree, index=0, count=1)
    assert not manifest.is_complete(tree)
    write_all(tree, 1)
    assert manifest.find_damage(tree, index=0, count=1) is None


@pytest.mark.parametrize(("index", "missing"), [(0, 1), (1, 0), (2, 0)])
def test_processes_wait_for_each_others_parts_but_not_for_ever(tree, index, missing):
    with pytest.raises(TimeoutError, match=rf"^process {missing} wrote no digests within 0\.05 seconds$"):
        manifest.write_all_parts(tree, index=index, count=3, seconds=0.05)
    assert manifest.is_unfinished(tree)
    assert not manifest.is_complete(tree)
    with ThreadPoolExecutor(3) as pool:  # which start one after the other
        for other in (2, 0, 1):
            pool.submit(manifest.write_all_parts, tree, index=other, count=3)
            time.sleep(0.03)
    assert manifest.is_complete(tree)
    assert not manifest.is_unfinished(tree)
    assert manifest.find_damage(tree, index=0, count=1) is None


def test_requests_grow_with_the_processes_and_not_with_their_square(tree, monkeypatch):
    """Each of the others asks for one part again and again until it is there, and process 0 for all of theirs."""
    count, asked, lock = 40, [], threading.Lock()
    exists = epath.Path("/").__class__.exists

    def counted(path):
        with lock:
            asked.append(path.name)
        return exists(path)

    for index in range(1, count):
        manifest.write_part(tree, index=index, count=count)
    monkeypatch.setattr(epath.Path("/").__class__, "exists", counted)
    assert not manifest.is_complete(tree)
    asked.clear()
    for index in range(count):
        manifest.write_all_parts(tree, index=index, count=count)
    assert manifest.is_complete(tree)
    assert sorted(asked) == sorted([f"{index}-of-{count}.json" for index in range(1, count)] + ["0-of-40.json"] * 39)


def test_all_processes_say_what_the_first_of_them_found(monkeypatch):
    assert manifest.agree("only me") == "only me"
    assert manifest.agree(None) is None

    def gather(mine):
        other = np.frombuffer("state/d/é: damaged".encode().ljust(manifest.LINE_BYTES, b"\0"), np.uint8)
        return np.stack([np.zeros_like(mine), other, mine])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(manifest.multihost_utils, "process_allgather", gather)
    assert manifest.agree("mine" * 1000) == manifest.agree(None) == "state/d/é: damaged"
    monkeypatch.setattr(manifest.multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine]))
    assert manifest.agree(None) is None
    assert manifest.agree("mine" * 1000) == "mine" * (manifest.LINE_BYTES // 4)


@pytest.fixture
def saved(tmp_path):
    """A directory with complete checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "run/checkpoints", keep=3) as checkpoints:
        save(checkpoints, 1, make_state(1))
        save(checkpoints, 2, make_state(2))
    return tmp_path / "run/checkpoints"


READERS = {
    "usable": lambda checkpoints: checkpoints.usable(),
    "restore": lambda checkpoints: checkpoints.restore(abstract(make_state())),
    "restore_params": lambda checkpoints: checkpoints.restore_params(abstract(make_state().params), 2),
    "read_config": lambda checkpoints: checkpoints.read_config(),
}


@pytest.mark.parametrize("reader", READERS)
def test_damage_to_any_file_of_a_checkpoint_is_one_line_and_nothing_besides(saved, reader, caplog, capfd):
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    files = all_files(saved / "000002")
    assert len(files) > 8
    for name in files:
        file = saved / "000002" / name
        content = file.read_bytes()
        damages = {"is missing": None, "truncated|as it was": content[:-1], "damaged": content + b"\0"}
        if content:
            flip(file, int(rng.integers(8 * len(content))))
            damages["its digest is not|as it was"] = file.read_bytes()
        else:
            del damages["truncated|as it was"]
        for message, damaged in damages.items():
            if damaged is None and name.startswith("manifest/"):
                continue  # as if killed before it was written: tested below
            file.unlink() if damaged is None else file.write_bytes(damaged)
            line = rf"^{saved}/000002/{name}: .*({message}).*; .*checkpoint\.allow_fallback=true.*$"
            with pytest.raises(CheckpointError, match=line):
                READERS[reader](Checkpoints(saved, keep=1))
            file.write_bytes(content)
    READERS[reader](Checkpoints(saved, keep=1))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_save_that_was_killed_before_its_digests_is_no_checkpoint_and_makes_room(saved, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_entry", killed)
        with pytest.raises(KilledError):
            save(Checkpoints(saved, keep=3), 3, make_state(3), wait=True)
    assert (saved / "000003/commit_success.txt").exists()
    with pytest.raises(CheckpointError, match="no complete checkpoint there"):
        find_checkpoint(saved / "000003")
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.usable() == 2
        assert capfd.readouterr().err == f"{saved}/000003: a save that is running, or was killed; not used\n"
        assert (saved / "000003").exists()
        save(checkpoints, 4, make_state(4))
    assert sorted(path.name for path in saved.iterdir()) == ["000001", "000002", "000004"]


def test_a_save_of_which_one_process_was_killed_is_no_checkpoint(saved):
    step = saved / "000002"
    shutil.rmtree(step / "manifest")
    manifest.write_part(step, index=1, count=2)
    checkpoints = Checkpoints(saved, keep=3)
    assert checkpoints.steps() == [1]
    manifest.write_part(step, index=0, count=2)
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(2))


def test_a_checkpoint_that_lost_its_manifest_is_set_aside_by_the_next_save_and_not_deleted(saved):
    (saved / "000002/manifest/0-of-1.json").unlink()
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.usable() == 1
        save(checkpoints, 3, make_state(3), wait=True)
    assert sorted(path.name for path in saved.iterdir()) == ["000001", "000002.damaged", "000003"]
    assert (saved / "000002.damaged/state/_METADATA").exists()


def test_a_checkpoint_that_lost_one_of_several_parts_is_damaged(saved):
    manifest.part_path(saved / "000002", 0, 1).rename(manifest.part_path(saved / "000002", 0, 2))
    line = r"000002/manifest/1-of-2\.json: is missing; checkpoint\.allow_fallback=true uses the one before it$"
    with pytest.raises(CheckpointError, match=line):
        Checkpoints(saved, keep=3).usable()
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.usable(allow_fallback=True) == 1
        save(checkpoints, 2, make_state(2), wait=True)
    assert sorted(path.name for path in saved.iterdir()) == ["000001", "000002", "000002.damaged"]


def test_a_foreign_file_in_a_checkpoint_harms_nothing(saved):
    for name in ("000002/.DS_Store", "000002/state/.nfs0001", ".DS_Store"):
        (saved / name).write_text("not ours")
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.usable() == 2
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(2))


@pytest.mark.parametrize("reader", READERS)
def test_a_link_out_of_a_checkpoint_is_not_followed(saved, reader):
    file = saved / "000002/_CHECKPOINT_METADATA"
    file.rename(saved / "elsewhere")
    file.symlink_to(saved / "elsewhere")
    with pytest.raises(CheckpointError, match=r"_CHECKPOINT_METADATA: is a link out of the checkpoint"):
        READERS[reader](Checkpoints(saved, keep=3))
    assert Checkpoints(saved, keep=3).glance().step == 1


def test_a_damaged_checkpoint_is_passed_over_only_if_allowed_and_kept_aside(saved, capfd):
    for attempt in ("000002.damaged", "000002.damaged-2"):
        flip(saved / "000002/state/_METADATA", 11)
        line = f"{saved}/000002/state/_METADATA: its digest is not the manifest's: damaged; "
        with pytest.raises(CheckpointError, match=rf"^{line}checkpoint\.allow_fallback=true uses the one before it$"):
            Checkpoints(saved, keep=3).usable()
        with Checkpoints(saved, keep=3) as checkpoints:
            assert checkpoints.usable(allow_fallback=True) == 1
            assert capfd.readouterr().err == f"{line}passed over, and kept as 000002.damaged from the next save on\n"
            assert (saved / "000002").exists()  # reading changes nothing
            assert checkpoints.steps() == [1]
            save(checkpoints, 2, make_state(22), wait=True)
            assert checkpoints.steps() == [1, 2]
            assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(22))
        assert (saved / attempt / "state/_METADATA").exists()
        assert find_checkpoint(saved) == (saved, None)
    assert len(list(saved.iterdir())) == 4


def test_where_all_are_damaged_no_run_starts_from_nothing(saved):
    for step in ("000001", "000002"):
        os.truncate(saved / step / "state/_METADATA", 11)
    with pytest.raises(CheckpointError, match=r"all of its checkpoints are damaged \(\[1, 2\]\); start a new run"):
        Checkpoints(saved, keep=3).usable(allow_fallback=True)
    shutil.rmtree(saved / "000002")
    with pytest.raises(CheckpointError, match=r"truncated; there is none before it$"):
        Checkpoints(saved, keep=3).usable()


def test_a_save_that_failed_is_told_without_waiting_for_one_that_runs(saved, monkeypatch):
    finish, write_part = threading.Event(), manifest.write_part

    def slow(directory, **keys):
        assert finish.wait(60)
        write_part(directory, **keys)
        if str(directory).endswith("4"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "write_part", slow)
    checkpoints = Checkpoints(saved, keep=3)
    checkpoints.raise_if_failed()
    assert checkpoints.blocked_seconds is None
    save(checkpoints, 3, make_state(3))
    checkpoints.raise_if_failed()  # it runs
    assert checkpoints.blocked_seconds > 0
    threading.Timer(0.2, finish.set).start()
    save(checkpoints, 4, make_state(4))  # waits for it
    assert checkpoints.blocked_seconds > 0.1
    while not checkpoints._running.done():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"saving step 4 failed: .*Input/output error"):
        checkpoints.raise_if_failed()
    checkpoints.raise_if_failed()  # told once
