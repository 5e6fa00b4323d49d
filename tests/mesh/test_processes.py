"""Several real processes on this machine (gloo, loopback) are one: the same losses, the same files, one voice."""

import errno
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from document_runs import write_documents
from processes import environment, free_port, run, run_together, together

from hybridnorm_jax.commands.eval import evaluate_run
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.errors import REQUEUE, ConfigError, MissingExtraError, RunStopped, UserError
from hybridnorm_jax.mesh import batch_shares
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.mesh.processes import Processes
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.program import Program

STEPS, SAVED = 6, 3
DATA, ACROSS = ("mesh.data=8",), ("mesh.data=1", "mesh.context=4", "mesh.tensor=2")
# Sums over devices are taken in another order by gloo than inside one process, and Adam divides by their size.
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 2e-6, 2e-5
SECONDS = 400  # machines that run tests are paused at times; nothing here takes a tenth of it


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A run of six steps over short texts, evaluated and saved on the way, with a sample at its end."""
    folder = tmp_path_factory.mktemp("data")
    write_documents(folder, count=30, words=60)
    return [
        *("model.d_model=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_dim=48"),
        *("model.vocab_size=257", "data.source=text", f"data.files=[{folder}/*.txt]", "data.validation_fraction=0.2"),
        *(f"data.cache_dir={folder}/cache", "data.segment_ids=true", "train.batch_size=16", "train.seq_len=32"),
        *(f"train.steps={STEPS}", "train.grad_accumulation=2", "train.log_every=1", "train.sample_tokens=3"),
        *(f"checkpoint.every={SAVED}", "checkpoint.keep=9", f"eval.every={SAVED}", "eval.batches=2"),
        *("optimizer.warmup_steps=2", "optimizer.learning_rate=1e-2"),
    ]


@pytest.fixture(scope="module")
def one(arguments, tmp_path_factory):
    """The run's directory, of this process alone."""
    return _alone(arguments, tmp_path_factory.mktemp("one"), DATA)


def _alone(arguments, folder, mesh):
    loop.train(parse([*arguments, *mesh, f"run.dir={folder}", "run.name=run"]))
    return folder / "run"


def _train(count, arguments, folder, mesh):
    """The run's directory, of `count` processes that share the eight devices, and what they printed."""
    asked = [*arguments, *mesh, f"run.dir={folder}", "run.name=run"]
    ended = run_together(count, asked, devices=8 // count, seconds=SECONDS)
    assert [status for status, _, _ in ended] == [0] * count, ended
    return folder / "run", ended


def _losses(directory):
    """{(step, name): loss} of training and evaluation; fails where a step was recorded twice."""
    losses = {}
    for record in read_records(directory):
        for name in {"train/loss", "train/grad_norm", "eval/validation/loss"} & record.keys():
            assert (record["step"], name) not in losses
            losses[record["step"], name] = record[name]
    return losses


def _parameters(arguments, directory, step=STEPS):
    config = parse([*arguments, *DATA])
    with Checkpoints(directory / "checkpoints", keep=9) as checkpoints:
        return checkpoints.restore_params(Program(config).abstract_state.params, step)


def _assert_same(arguments, ours, expected):
    before, after = _losses(expected), _losses(ours)
    assert len(before) == 2 * STEPS + STEPS // SAVED
    assert after.keys() == before.keys()
    np.testing.assert_allclose([after[key] for key in before], list(before.values()), rtol=LOSS_TOLERANCE)
    pairs = zip(
        jax.tree.leaves_with_path(_parameters(arguments, ours)),
        jax.tree.leaves(_parameters(arguments, expected)),
        strict=True,
    )
    for (path, left), right in pairs:
        np.testing.assert_allclose(left, right, atol=PARAMETER_TOLERANCE, rtol=0, err_msg=jax.tree_util.keystr(path))


def _stopped_after_save(directory, folder):
    """A copy of a run as it was when it had saved its first checkpoint."""
    copy = folder / "run"
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / f"checkpoints/{STEPS:06d}")
    return copy


@pytest.mark.long
def test_two_processes_are_one_and_their_checkpoint_is_its(arguments, one, tmp_path):
    two, ended = _train(2, arguments, tmp_path / "two", DATA)
    _assert_same(arguments, two, one)
    (_, first, _), (_, second, second_errors) = ended
    # Gloo's own lines are C++'s, on both, and not always whole.
    for told in (
        "8 x cpu in 2 processes",
        "Time of this process",
        "Evaluation after step 6",
        "Sample of text",
        "Next:",
    ):
        assert told in first
        assert told not in second
    assert "step" not in second_errors
    assert "distributed." not in first.partition("Next:")[2]

    resumed = _stopped_after_save(two, tmp_path / "alone")
    _alone(arguments, tmp_path / "alone", DATA)
    _assert_same(arguments, resumed, one)


@pytest.mark.long
def test_a_checkpoint_of_one_process_resumes_on_two_with_split_sequences(arguments, one, tmp_path):
    resumed = _stopped_after_save(one, tmp_path)
    _, ended = _train(2, arguments, tmp_path, ACROSS)
    assert f"goes on after step {SAVED} of" in ended[0][1]
    _assert_same(arguments, resumed, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ("mesh.data=1", "mesh.fsdp=8"),
        ("mesh.data=1", "mesh.tensor=4", "mesh.fsdp=2"),
        ("mesh.data=1", "mesh.tensor=8"),
        ACROSS,
        ("mesh.data=2", "mesh.replica=2", "mesh.fsdp=2"),
    ],
    ids=" ".join,
)
def test_two_processes_are_one_on_every_axis(mesh, arguments, tmp_path):
    two, _ = _train(2, arguments, tmp_path / "two", mesh)
    _assert_same(arguments, two, _alone(arguments, tmp_path / "one", mesh))


@pytest.mark.slow
def test_four_processes_are_one_and_their_checkpoint_resumes_on_one_and_two(arguments, one, tmp_path):
    four, _ = _train(4, arguments, tmp_path / "four", DATA)
    _assert_same(arguments, four, one)
    resumed = _stopped_after_save(four, tmp_path / "alone")
    _alone(arguments, tmp_path / "alone", ("mesh.data=1", "mesh.fsdp=8"))
    _assert_same(arguments, resumed, one)
    resumed = _stopped_after_save(four, tmp_path / "two")
    _train(2, arguments, tmp_path / "two", DATA)
    _assert_same(arguments, resumed, one)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(one):
    ended = run_together(2, [str(one)], devices=4, seconds=SECONDS, script="eval.py")
    assert [status for status, _, _ in ended] == [0, 0], ended
    told = re.search(r"^validation +([\d.]+)", ended[0][1], re.MULTILINE)
    assert "validation" not in ended[1][1]
    alone = evaluate_run(str(one), progress=False).scores["validation"].loss
    assert float(told[1]) == pytest.approx(alone, abs=6e-5)  # four digits are printed


def test_an_error_of_all_is_told_by_one(arguments, tmp_path):
    asked = [*arguments, "mesh.data=3", f"run.dir={tmp_path}", "run.name=run"]
    (first, _, told), (second, _, untold) = run_together(2, asked, devices=1, seconds=SECONDS)
    assert (first, second) == (2, 2)
    (line,) = told.splitlines()
    assert line.startswith("error: mesh.replica=1, mesh.data=3")
    assert "must multiply to the 2 devices there are" in line
    assert untold == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_one_that_fails_tells_why_and_ends_the_others(arguments, tmp_path):
    asked = [*arguments, "mesh.data=2", f"run.dir={tmp_path}", "run.name=run"]
    port = free_port()
    here, there = ([*asked, *together(port, 2, number)] for number in range(2))
    (tmp_path / "file").touch()
    there = [*there, f"data.cache_dir={tmp_path}/file/cache"]
    (first, _, _), (second, _, told) = run([here, there], devices=1, seconds=SECONDS)
    assert second == 2
    assert "process 1: error: " in told
    assert "/file/cache" in told
    assert first not in (0, -9)


def test_a_coordinator_that_is_not_there_ends_in_one_line(arguments, tmp_path):
    port = free_port()
    asked = [*arguments, *together(port, 2, 1), "distributed.timeout_seconds=2", f"run.dir={tmp_path}"]
    ((status, _, told),) = run([asked], devices=1, seconds=SECONDS)
    assert status == 2
    (line,) = told.splitlines()
    meeting = f"process 1 of 2 did not meet the others at 127.0.0.1:{port} within 2 seconds"
    assert meeting in line
    assert "Traceback" not in told


def test_sigterm_still_ends_a_process_that_does_not_look_for_it():
    program = (
        "import os, signal\n"
        "from hybridnorm_jax.mesh.processes import Processes\n"
        "from hybridnorm_jax.config.run_config import DistributedSection\n"
        f"section = DistributedSection(coordinator='127.0.0.1:{free_port()}', num_processes=1, process_id=0)\n"
        "with Processes().running(section):\n"
        "    print('up', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    import time; time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.stdout == "up\n", ended.stderr
    assert ended.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [0, 1])
def test_a_typo_needs_no_cluster_and_is_told_once(number, capsys):
    arguments = [*together(1, 2, number), "train.stepz=3"]
    assert main(["train", *arguments]) == 2
    assert main(["eval", "runs/none", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()
    assert all("train.stepz=3: no such key" in line for line in told)
    assert len(told) == (2 if number == 0 else 0)


def test_a_file_of_one_host_is_told_by_that_host(capsys):
    assert main(["train", "/nowhere.yaml", *together(1, 2, 1)]) == 2
    assert capsys.readouterr().err.startswith("process 1: error: /nowhere.yaml: cannot be read")


def _caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "speaks"),
    [
        (UserError("train.steps=0"), False),
        (RunStopped(REQUEUE, "saved"), False),
        (_caused(UserError("a.txt: cannot be read"), OSError()), True),
        (_caused(MissingExtraError("run.wandb=true", extra="wandb"), ImportError()), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (_caused(ImportError("install gcsfs"), ImportError("gcsfs")), True),  # as fsspec raises it
    ],
    ids=str,
)
def test_the_others_speak_of_what_may_be_of_their_host_alone(error, speaks):
    assert Processes(together(1, 2, 1)).speaks(error) == speaks
    assert Processes(together(1, 2, 0)).speaks(error)


def test_processes_of_one_run_give_it_one_name():
    names = {parse([*together(1, 4, number), "train.seed=3"]).run.name for number in range(4)}
    assert names == {"quickstart-seed=3"}


class _Device:
    """A device as another process would see it."""

    def __init__(self, process_index):
        self.process_index = process_index


def _shares(mesh, processes, monkeypatch):
    """[(share, rows held)] if the mesh's devices belonged to this many processes."""
    each = mesh.size // processes
    placed = batch_shares.batch_sharding(mesh, 0).devices_indices_map((batch_shares.batch_parts(mesh),))
    seen = {_Device(device.id // each): rows for device, rows in placed.items()}
    shares = []
    with monkeypatch.context() as patch:
        patch.setattr(batch_shares, "batch_sharding", lambda *_: SimpleNamespace(devices_indices_map=lambda _: seen))
        for number in range(processes):
            patch.setattr(jax, "process_index", lambda number=number: number)
            held = {rows.start or 0 for device, (rows,) in seen.items() if device.process_index == number}
            shares.append((batch_shares.batch_share(mesh), held))
    return shares


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "context": 4}, {"tensor": 8}, {"replica": 2, "data": -1}],
    ids=str,
)
def test_no_process_reads_the_rows_of_another(sizes, processes, monkeypatch):
    shares = _shares(make_mesh(sizes), processes, monkeypatch)
    (count,) = {count for (_, count), _ in shares}
    assert {number for (number, _), _ in shares} == set(range(count))
    for mine, my_rows in shares:
        for other, rows in shares:
            assert (mine == other) == (my_rows == rows) == bool(my_rows & rows)


def test_rows_that_cannot_be_shared_equally_are_refused(monkeypatch):
    # Three processes of two devices each: the middle one holds the last third of one half and the first of the other.
    mesh = make_mesh({"data": 2, "tensor": 3}, jax.devices()[:6])
    with pytest.raises(ConfigError, match=r"splits a batch into 2 parts, which 3 processes cannot share equally"):
        _shares(mesh, 3, monkeypatch)


def test_a_dry_run_says_what_is_needed_and_leaves_nothing(arguments, tmp_path, capsys):
    mesh = ("mesh.data=2", "mesh.fsdp=4", "train.steps=7")
    missing = [*arguments, *mesh, f"run.dir={tmp_path}/runs", "data.files=[/nowhere/*.txt]", "--dry-run"]
    assert main(["train", *missing]) == 0
    told = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    program = Program(parse(missing[:-1]))
    here = jax.devices()[0]
    fresh = program.fresh_state()

    def held(tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == here]
        return sum(shard.data.size for shard in shards), sum(shard.data.nbytes for shard in shards) / 2**20

    count, size = held(fresh.params)
    for line in (
        "mesh         data 2, fsdp 4",
        "data         not read: text /nowhere/*.txt",
        "per process  2 x 8 sequences; process 0 reads share 1 of 1",
        "per device   2 x 1 sequences of 32",
        f"{count:,} parameters, {size:,.1f} MiB; optimizer state {held(fresh.opt_state)[1]:,.1f} MiB",
    ):
        assert line in told
    assert re.search(r"memory +per device, as the compiler says: [\d.]+ MiB at the peak", told)
    assert re.search(r"[1-9][\d.]* MiB of temporaries", told) or re.search(r"0\.[1-9] MiB of temporaries", told)


def test_a_dry_run_refuses_what_training_would(arguments, tmp_path, capsys):
    assert main(["train", *arguments, "mesh.data=8", "train.batch_size=14", f"run.dir={tmp_path}", "--dry-run"]) == 2
    assert "7 sequences at a time, must be a multiple" in capsys.readouterr().err


def test_a_step_without_room_is_said_after_the_report(arguments, tmp_path, capsys, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory: 40 of 16 GB\nmore")

    monkeypatch.setattr(Program, "lower_train_step", lambda self: Lowered())
    assert main(["train", *arguments, "mesh.data=8", f"run.dir={tmp_path}", "--dry-run"]) == 2
    told = capsys.readouterr()
    assert "optimizer state" in told.out
    assert "error: the train step does not fit these devices: Ran out of memory: 40 of 16 GB; raise" in told.err


def test_processes_with_other_words_are_refused(arguments, tmp_path):
    """Otherwise two seeds would train two models, and save a mixture of them."""
    port = free_port()
    asked = [*arguments, f"run.dir={tmp_path}", "run.name=run"]
    each = [[*asked, f"train.seed={number}", *together(port, 2, number)] for number in range(2)]
    (first, _, told), (second, _, untold) = run(each, devices=1, seconds=SECONDS)
    assert (first, second) == (2, 2)
    (line,) = told.splitlines()
    assert line.startswith("error: train.seed: not the same in all processes")
    assert untold == ""
    assert not any(tmp_path.iterdir())
