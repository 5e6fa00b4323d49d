"""Two processes with a disk each: one loses its disk, or they change places; and what then can be put together."""

import os
import shutil

import pytest
from document_runs import training_losses, write_documents
from processes import free_port, run, together

STEPS, CRASH_AFTER, KEPT = 6, 5, 4
SECONDS = 400
# The program, but it ends at once after a step, as with its host, and its last local save is complete or not there.
CRASHING = """\
import os, sys
from hybridnorm_jax.commands.main import start
from hybridnorm_jax.training import loop
from hybridnorm_jax.training.hooks.hook import Hook

class Crash(Hook):
    def after_step(self, run):
        if run.step == int(os.environ.get("CRASH_AFTER", "0")):
            run.local.wait()
            os._exit(9)

built_in = loop.built_in_hooks
loop.built_in_hooks = lambda config: [*built_in(config), Crash()]
if __name__ == "__main__":
    sys.exit(start(["train", *sys.argv[1:]]))
"""
REPLICATED, SPLIT = ("mesh.data=2", "mesh.fsdp=2"), ("mesh.data=1", "mesh.fsdp=4")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(the script, the arguments of the run)."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "crashing.py").write_text(CRASHING)
    write_documents(folder)
    words = [
        *("model.d_model=32", "model.num_layers=1", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_dim=48"),
        *("model.vocab_size=257", "data.source=text", f"data.files=[{folder}/*.txt]", "data.validation_fraction=0.2"),
        *(f"data.cache_dir={folder}/cache", "train.batch_size=8", "train.seq_len=24", f"train.steps={STEPS}"),
        *("train.log_every=1", "eval.batches=1", "checkpoint.local_dir=~/disk", "checkpoint.local_every=2"),
    ]
    return str(folder / "crashing.py"), words


def _run(program, folder, name, mesh, *, homes, crash=0):
    """Two processes, each with a home of its own: [(status, standard output, standard error)]."""
    script, words = program
    port = free_port()
    environs = [{"HOME": str(folder / home), "CRASH_AFTER": str(crash)} for home in homes]
    asked = [
        [*words, *mesh, f"run.dir={folder}/runs", f"run.name={name}", *together(port, 2, number)] for number in (0, 1)
    ]
    return run(asked, devices=2, seconds=SECONDS, script=script, environs=environs)


def _losses(folder, name):
    return training_losses(folder / "runs" / name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh", "homes", "lost", "goes_on"),
    [
        (REPLICATED, ("a", "b"), "b", True),  # what was on the lost disk is on the other one
        (REPLICATED, ("a", "b"), "a", True),
        (SPLIT, ("b", "a"), None, True),  # each process finds the other one's blocks
        (SPLIT, ("a", "b"), "b", False),  # half of every array is gone
    ],
    ids=["the second disk is lost", "the first disk is lost", "changed places", "split and lost"],
)
def test_a_run_goes_on_with_what_the_disks_have_together(mesh, homes, lost, goes_on, program, tmp_path):
    for home in ("a", "b", "c", "d"):
        (tmp_path / home).mkdir()
    whole = _run(program, tmp_path, "whole", mesh, homes=("c", "d"))
    assert [status for status, _, _ in whole] == [0, 0], whole
    crashed = _run(program, tmp_path, "run", mesh, homes=("a", "b"), crash=CRASH_AFTER)
    assert 9 in [status for status, _, _ in crashed], crashed
    assert not (tmp_path / "runs/run/checkpoints").exists()
    if lost is not None:
        shutil.rmtree(tmp_path / lost / "disk")
    ended = _run(program, tmp_path, "run", mesh, homes=homes)
    assert [status for status, _, _ in ended] == [0, 0], ended
    (_, _, errors), (_, _, second_errors) = ended
    assert (f"note: goes on after step {KEPT}, from the hosts' own disks" in errors) == goes_on
    assert (f"note: step {KEPT} of checkpoint.local_dir is passed over: no host has all of" in errors) != goes_on
    assert "note:" not in second_errors
    assert _losses(tmp_path, "run") == _losses(tmp_path, "whole")
    assert os.listdir(tmp_path / "runs/run/checkpoints") == [f"{STEPS:06d}"]
