"""launch/slurm.sbatch: with stand-ins for srun and scontrol, and under a real SLURM of this machine alone."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from processes import free_port
from stand_ins import LAUNCH, REPOSITORY

from hybridnorm_jax.config.arguments import parse

SCRIPT = LAUNCH / "slurm.sbatch"
ALLOCATION = {
    "SLURM_SUBMIT_DIR": str(REPOSITORY),
    "SLURM_JOB_ID": "7",
    "SLURM_GPUS_ON_NODE": "4",
    "PYTHON": "/bin/true",
}


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False), (134, False)])
def test_it_runs_what_is_asked_and_requeues_what_was_stopped(status, requeued, stand_ins):
    stand_ins.add("srun", status=status)
    stand_ins.add("scontrol")
    ended = stand_ins.run(SCRIPT, "550m", "data.files=[/data/*.npy]", **ALLOCATION)
    assert ended.returncode == status, ended.stderr
    run, *others = stand_ins.calls()
    assert others == ([["scontrol", "requeue", "7"]] if requeued else [])
    module = run.index("-m")
    assert run[module : module + 3] == ["-m", "hybridnorm_jax", "train"]
    config = parse(run[module + 3 :])
    assert (config.data.files, config.run.dir, config.distributed.initialize) == (("/data/*.npy",), "runs", "true")


def test_it_names_all_gpus_of_a_process_that_has_the_node_to_itself(stand_ins, tmp_path):
    stand_ins.add("srun", script=f"echo $JAX_LOCAL_DEVICE_IDS $@ > {tmp_path}/seen")
    alone = ALLOCATION | {"SLURM_NTASKS_PER_NODE": "1", "DRY_RUN": "1"}
    ended = stand_ins.run(SCRIPT, "550m", **alone)
    assert ended.returncode == 0, ended.stderr
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith("0,1,2,3 ")
    assert seen.endswith("--dry-run\n")
    assert stand_ins.run(SCRIPT, **alone).returncode == 2


def test_a_node_without_gpus_is_refused_in_one_line(stand_ins):
    stand_ins.add("srun")
    alone = {name: value for name, value in ALLOCATION.items() if name != "SLURM_GPUS_ON_NODE"}
    ended = stand_ins.run(SCRIPT, "550m", **alone | {"SLURM_NTASKS_PER_NODE": "1"})
    wrong = "error: SLURM gave this job no GPUs; ask for them, such as sbatch --gpus-per-node=8\n"
    assert (ended.returncode, ended.stderr) == (2, wrong)
    assert not stand_ins.calls()


CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
MpiDefault=none
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """A SLURM of one node, whose 8 GPUs are files; returns the environment for its commands."""
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("needs Debian's slurm-wlm")
    host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    for number in range(8):
        (tmp_path / f"gpu{number}").touch()
    ports = (free_port(), free_port())
    (tmp_path / "slurm.conf").write_text(CONFIGURATION.format(host=host, user=user, ports=ports, home=tmp_path))
    (tmp_path / "gres.conf").write_text(f"Name=gpu File={tmp_path}/gpu[0-7]\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ = kept | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    quiet = {"env": environ, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [subprocess.Popen([name, "-D", *more], **quiet) for name, more in (("slurmctld", ["-i"]), ("slurmd", []))]
    try:
        _until(lambda: "idle" in _output(environ, "sinfo", "--noheader", "--format=%t"), seconds=30)
        yield environ
    finally:
        _output(environ, "scancel", "--user", user)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def _output(environ, *command):
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False).stdout


def _until(condition, *, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


# Of this machine: one node, whose CPUs are two processes' and not those of all GPUs.
SUBMITTED = ("--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--parsable")


def _submit(slurm, tmp_path, *words, **environ):
    command = ["sbatch", *SUBMITTED, f"--output={tmp_path}/job.log", SCRIPT, *words]
    submitted = subprocess.run(
        command, env=slurm | environ, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def _state(slurm, job):
    return _output(slurm, "squeue", "--noheader", "--states=all", f"--job={job}", "--format=%T").strip()


@pytest.mark.slow
def test_slurm_takes_the_script_and_runs_a_stopped_job_again(slurm, tmp_path):
    """The first time the program ends as one that was stopped, after that as one that has come to its end."""
    program = tmp_path / "program"
    program.write_text(
        f"#!/bin/bash\necho $SLURM_PROCID of $SLURM_NTASKS on $SLURM_STEP_NODELIST: $@ >> {tmp_path}/told\n"
        f"[ -e {tmp_path}/stopped ] && exit 0\nsleep 1\ntouch {tmp_path}/stopped\nexit 75\n"
    )
    program.chmod(0o755)
    job = _submit(slurm, tmp_path, "550m", "data.files=[/data/*.npy]", PYTHON=str(program))
    settings = _output(slurm, "scontrol", "show", "job", job)
    assert "Requeue=1" in settings
    assert "TimeLimit=1-00:00:00" in settings
    _until(lambda: _state(slurm, job) == "PENDING", seconds=60)
    # SLURM lets a job that was put back wait for two minutes.
    assert _output(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now") == ""
    _until(lambda: _state(slurm, job) == "COMPLETED", seconds=240)
    host = _output(slurm, "sinfo", "--noheader", "--format=%n").strip()
    told = "-m hybridnorm_jax train 550m data.files=[/data/*.npy] run.dir=runs distributed.initialize=true"
    lines = sorted((tmp_path / "told").read_text().splitlines())
    assert lines == sorted(2 * [f"{number} of 2 on {host}: {told}" for number in (0, 1)])


@pytest.mark.slow
def test_two_processes_under_slurm_train_one_run_and_stop_together(slurm, tmp_path):
    """JAX finds the processes by SLURM's variables alone; SIGTERM, as SLURM sends it, makes both save."""
    words = ["data.cache_dir=" + str(tmp_path / "cache"), "run.name=together", "train.steps=100000", "eval.batches=1"]
    small = ["model.d_model=32", "model.num_layers=1", "model.num_heads=2", "train.batch_size=4", "train.seq_len=32"]
    environ = {"PYTHON": sys.executable, "RUN_DIR": str(tmp_path / "runs"), "JAX_PLATFORMS": "cpu"}
    one = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(REPOSITORY)}
    job = _submit(slurm, tmp_path, *words, *small, **environ | one)
    metrics = tmp_path / "runs/together/metrics.jsonl"
    _until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, seconds=240)
    _output(slurm, "scancel", "--signal=TERM", job)
    _until(lambda: _state(slurm, job) == "PENDING", seconds=120)
    log = (tmp_path / "job.log").read_text()
    assert "2 processes" in log, log
    assert list((tmp_path / "runs/together/checkpoints").glob("[0-9]*")), log
