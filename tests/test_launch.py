"""The files in launch/: what they name exists, and what they would run is what `hybridnorm train` takes."""

import os
import re
import shlex
import shutil
import stat
import string
import subprocess
from pathlib import Path

import pytest
import yaml

from hybridnorm_jax.config.arguments import parse

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = [LAUNCH / "tpu_vm.sh", LAUNCH / "slurm.sbatch"]


def _jobset():
    """The YAML with the values of its own first lines; the exports and the list for envsubst must be the same."""
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    exported = dict(re.findall(r'^#   export (\w+)="?([^"#\n]*?)"?(?:[ \t]+#.*)?$', text, re.MULTILINE))
    listed = re.search(r"printf '\$\{%s\} ' ([\w\s\\#]+)\)", text)[1]
    assert set(re.findall(r"\w+", listed)) == set(exported)
    body = text.partition("\napiVersion:")[2]
    assert set(re.findall(r"\$\{(\w+)\}", body)) == set(exported)
    assert not re.search(r"\$\w", body)  # envsubst would fill these in as well
    return yaml.safe_load("apiVersion:" + string.Template(body).substitute(exported)), exported


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script], check=True)


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "gke_jobset.yaml"], ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path):
    text = path.read_text()
    named = set(re.findall(r"(?:configs|launch|docs)/[\w.]+\.\w+|\b\w+\.py\b", text))
    assert "docs/clusters.md" in named
    for name in named:
        assert (REPOSITORY / name).is_file(), name
    extras = re.findall(r"-e '\.\[(\w+)\]'", text)
    assert extras
    assert all(re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), re.M) for extra in extras)


def test_the_jobset_is_one_and_its_arguments_are_those_of_train():
    jobset, exported = _jobset()
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    (policy,) = job["podFailurePolicy"]["rules"]
    assert policy["onExitCodes"]["values"] == [2]
    assert policy["onExitCodes"]["containerName"] == container["name"]

    (script,) = container["args"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = script.splitlines()[-1]
    assert command.startswith("exec hybridnorm train 550m ")
    assert f'git checkout --quiet "{exported["REVISION"]}"' in script
    config = parse(shlex.split(command)[3:])
    assert (config.mesh.replica, config.run.name, config.run.dir) == (2, "hybridnorm-550m", "gs://BUCKET/runs")
    assert config.distributed.initialize == "true"


@pytest.fixture
def stand_in(tmp_path):
    """Puts commands into the way that only write down how they were called; returns the environment."""

    def make(**statuses):
        for name, status in statuses.items():
            file = tmp_path / "bin" / name
            file.parent.mkdir(exist_ok=True)
            line = f'printf "%s\\0" {name} "$@" >> {tmp_path}/calls; printf "\\n" >> {tmp_path}/calls'
            file.write_text(f"#!/bin/bash\n{line}\nexit {status}\n")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}

    return make


def _calls(tmp_path):
    return [call.strip("\0").split("\0") for call in (tmp_path / "calls").read_text().split("\n") if call]


def _sbatch(environ, *words):
    allocation = {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "4",
        "PYTHON": "/bin/true",
    }
    command = ["bash", LAUNCH / "slurm.sbatch", *words]
    return subprocess.run(command, env=environ | allocation, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False), (134, False)])
def test_slurm_runs_what_is_asked_and_requeues_what_was_stopped(status, requeued, stand_in, tmp_path):
    ended = _sbatch(stand_in(srun=status, scontrol=0), "550m", "data.files=[/data/*.npy]")
    assert ended.returncode == status, ended.stderr
    run, *others = _calls(tmp_path)
    assert others == ([["scontrol", "requeue", "7"]] if requeued else [])
    module = run.index("-m")
    assert run[module : module + 3] == ["-m", "hybridnorm_jax", "train"]
    config = parse(run[module + 3 :])
    assert (config.data.files, config.run.dir, config.distributed.initialize) == (("/data/*.npy",), "runs", "true")


def test_slurm_names_all_gpus_of_a_process_that_has_the_node_to_itself(stand_in, tmp_path):
    environ = stand_in(scontrol=0)
    (tmp_path / "bin/srun").write_text(f"#!/bin/bash\necho $JAX_LOCAL_DEVICE_IDS $@ > {tmp_path}/seen\n")
    (tmp_path / "bin/srun").chmod(0o755)
    ended = _sbatch({**environ, "SLURM_NTASKS_PER_NODE": "1", "DRY_RUN": "1"}, "550m")
    assert ended.returncode == 0, ended.stderr
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith("0,1,2,3 ")
    assert seen.endswith("--dry-run\n")
    assert _sbatch(environ).returncode == 2


TPU = {"TPU_NAME": "slice", "ZONE": "us-east5-a", "RUN_DIR": "gs://bucket/my runs"}


def _tpu_vm(environ, *words):
    command = ["bash", LAUNCH / "tpu_vm.sh", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_tpu_vm_starts_training_on_all_hosts_with_the_arguments_as_they_are(stand_in, tmp_path):
    environ = stand_in(gcloud=0) | TPU
    words = ["550m", "data.files=[/data/a b/*.npy]", "run.name=it's"]
    for action in ("start", "dry-run"):
        ended = _tpu_vm(environ, action, *words)
        assert ended.returncode == 0, ended.stderr
    text = (tmp_path / "calls").read_text()
    for call in text.split("gcloud\0")[1:]:
        arguments = call.strip("\n\0").split("\0")
        assert arguments[:5] == ["compute", "tpus", "tpu-vm", "ssh", "slice"]
        assert {"--zone=us-east5-a", "--worker=all"} <= set(arguments)
        (remote,) = [word.removeprefix("--command=") for word in arguments if word.startswith("--command=")]
        subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
        (line,) = [line for line in remote.splitlines() if "hybridnorm train" in line]
        asked = shlex.split(
            line.partition(".venv/bin/hybridnorm train")[2].partition(" >> ")[0].replace("--dry-run", "")
        )
        config = parse(asked)
        assert config.data.files == ("/data/a b/*.npy",)
        assert (config.run.name, config.run.dir) == ("it's", "gs://bucket/my runs")
    assert "--dry-run" in text


def test_tpu_vm_detaches_refuses_a_second_start_and_stops(stand_in, tmp_path):
    """What it sends to the hosts, run in a home directory of this machine, with a program that only waits."""
    home = tmp_path / "home"
    (home / "hybridnorm_jax/.venv/bin").mkdir(parents=True)
    program = home / "hybridnorm_jax/.venv/bin/hybridnorm"
    program.write_text(
        "#!/bin/bash\necho told \"$@\"\ntrap 'echo saved; exit 75' TERM\nwhile true; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    environ = stand_in(gcloud=0) | TPU
    run = f'cd {home} && exec bash -c "${{word#--command=}}"'
    (tmp_path / "bin/gcloud").write_text(f"#!/bin/bash\nfor word; do case $word in --command=*) {run};; esac; done\n")
    assert "not training" in _tpu_vm(environ, "status").stdout
    started = _tpu_vm(environ, "start", "550m")
    assert started.returncode == 0, started.stderr
    try:
        second = _tpu_vm(environ, "start", "550m")
        assert second.returncode != 0
        assert "already training" in second.stderr
        assert ": training" in _tpu_vm(environ, "status").stdout
    finally:
        stopped = _tpu_vm(environ, "stop")
    assert stopped.returncode == 0
    log = home / "hybridnorm_jax/train.log"
    for _ in range(100):
        if "saved" in log.read_text():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert log.read_text().splitlines() == ["told train 550m run.dir=gs://bucket/my runs", "saved"]


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        ((), TPU, "launch/tpu_vm.sh install"),
        (("restart",), TPU, "launch/tpu_vm.sh install"),
        (("start",), TPU, "launch/tpu_vm.sh install"),
        (("start", "550m"), {**TPU, "RUN_DIR": ""}, "RUN_DIR is not set"),
        (("status",), {}, "TPU_NAME is not set"),
    ],
    ids=str,
)
def test_tpu_vm_says_what_is_missing(words, environ, message, stand_in):
    ended = _tpu_vm(stand_in(gcloud=0) | environ, *words)
    assert ended.returncode == 2
    assert message in ended.stderr
