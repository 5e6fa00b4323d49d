"""launch/skypilot.yaml and launch/xpk.sh hand on what `hybridnorm train` takes.

SkyPilot and xpk are too heavy for the extra dev. By hand, SkyPilot 0.14.1 has read the task, and xpk 1.16.0 has made
its JobSet of the command.
"""

import subprocess

import pytest
import yaml
from stand_ins import LAUNCH

from hybridnorm_jax.config.arguments import parse

XPK = LAUNCH / "xpk.sh"
ASKED = {
    "CLUSTER": "cluster",
    "RUN_NAME": "big",
    "RUN_DIR": "gs://bucket/my runs",
    "IMAGE": "registry/hybridnorm:tpu",
    "TPU_TYPE": "v6e-64",
    "SLICES": "2",
}
NODES = {"SKYPILOT_NODE_IPS": "10.0.0.2\n10.0.0.3", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}


@pytest.fixture
def task():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_the_task_has_only_what_skypilot_knows(task):
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "envs", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "disk_size", "job_recovery"}
    assert set(task["resources"]["job_recovery"]) == {"strategy", "recover_on_exit_codes"}
    assert task["envs"]["ARGUMENTS"] is None  # so that SkyPilot asks for it


@pytest.mark.parametrize("extra", ["gpu", "tpu"])
def test_every_node_trains_with_its_own_number(extra, task, stand_ins, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stand_ins.add("hybridnorm", status=75)
    (tmp_path / ".venv/bin/hybridnorm").symlink_to(tmp_path / "stand-ins/hybridnorm")
    (tmp_path / "data.files=x").touch()  # what the pattern would become if the shell read it
    environ = stand_ins.environ | NODES | task["envs"] | {"EXTRA": extra}
    environ["ARGUMENTS"] = "550m data.files=[/data/*.npy] data.files=* 'data.files=[/data/a b/*.npy]'"
    ended = subprocess.run(["bash", "-c", task["run"]], env=environ, cwd=tmp_path, check=False)
    assert ended.returncode == 75
    ((_, train, *arguments),) = stand_ins.calls()
    assert (train, arguments[2]) == ("train", "data.files=*")
    section = parse([word for word in arguments if word != "data.files=*"]).distributed
    found = ("10.0.0.2:8476", 2, 1) if extra == "gpu" else (None, None, None)
    assert (section.coordinator, section.num_processes, section.process_id) == found
    assert section.initialize == "true"


def test_the_setup_installs_the_extra(task, stand_ins, tmp_path):
    stand_ins.add("python3", script=f"mkdir -p {tmp_path}/.venv/bin && cp $0 {tmp_path}/.venv/bin/python")
    environ = stand_ins.environ | {"EXTRA": "tpu"}
    subprocess.run(["bash", "-c", task["setup"]], env=environ, cwd=tmp_path, check=True)
    venv, _, install = stand_ins.calls()
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install[install.index("--quiet") + 1] == ".[tpu]"


def test_xpk_gets_the_command_with_the_arguments_as_they_are(stand_ins, tmp_path):
    for name in ("xpk", "hybridnorm"):
        stand_ins.add(name, status=0)
    words = ["550m", "data.files=[/data/a b/*.npy]", "mesh.replica=2", "train.sample_tokens=1"]
    ended = stand_ins.run(XPK, *words, "train.sample_prompt=it's $HOME", ZONE="us-east5-a", **ASKED)
    assert ended.returncode == 0, ended.stderr
    (xpk,) = stand_ins.calls()
    assert xpk[1:3] == ["workload", "create"]
    for option in ("--cluster=cluster", "--workload=big", "--tpu-type=v6e-64", "--num-slices=2", "--zone=us-east5-a"):
        assert option in xpk
    (command,) = [word.removeprefix("--command=") for word in xpk if word.startswith("--command=")]
    # As xpk writes it into the script of the pod.
    subprocess.run(["bash", "-c", f"({command}) & wait $!"], env=stand_ins.environ, check=True)
    _, (name, train, *arguments) = stand_ins.calls()
    assert (name, train, arguments[: len(words)]) == ("hybridnorm", "train", words)
    config = parse(arguments)
    assert (config.run.name, config.run.dir) == ("big", "gs://bucket/my runs")
    assert config.train.sample_prompt == "it's $HOME"


@pytest.mark.parametrize("name", ["CLUSTER", "RUN_NAME", "RUN_DIR", "IMAGE", "TPU_TYPE"])
def test_xpk_is_not_called_without_what_it_needs(name, stand_ins):
    stand_ins.add("xpk")
    ended = stand_ins.run(XPK, "550m", **ASKED | {name: ""})
    assert (ended.returncode, ended.stderr) == (2, f"error: {name} is not set: {name}=... launch/xpk.sh\n")
    assert stand_ins.run(XPK, **ASKED).returncode == 2
    assert not stand_ins.calls()
