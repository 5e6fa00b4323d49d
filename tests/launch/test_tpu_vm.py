"""launch/tpu_vm.sh: what it sends to the hosts of a TPU VM is what was asked, and works in a shell."""

import os
import shlex
import subprocess
import time

import pytest
from stand_ins import LAUNCH

from hybridnorm_jax.config.arguments import parse

SCRIPT = LAUNCH / "tpu_vm.sh"
TPU = {"TPU_NAME": "slice", "ZONE": "us-east5-a", "RUN_DIR": "gs://bucket/my runs"}


def _remote(call):
    """The command line that a call of gcloud runs on the hosts."""
    (remote,) = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
    return remote


def test_it_trains_on_all_hosts_with_the_arguments_as_they_are(stand_ins):
    stand_ins.add("gcloud")
    for action in ("start", "dry-run"):
        ended = stand_ins.run(SCRIPT, action, "550m", "data.files=[/data/a b/*.npy]", "run.name=it's", **TPU)
        assert ended.returncode == 0, ended.stderr
    for call in stand_ins.calls():
        assert call[1:6] == ["compute", "tpus", "tpu-vm", "ssh", "slice"]
        assert {"--zone=us-east5-a", "--worker=all"} <= set(call)
        remote = _remote(call)
        subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
        (line,) = [line for line in remote.splitlines() if "hybridnorm train" in line]
        asked = line.partition(".venv/bin/hybridnorm train")[2].partition(" >> ")[0].replace("--dry-run", "")
        config = parse(shlex.split(asked))
        assert config.data.files == ("/data/a b/*.npy",)
        assert (config.run.name, config.run.dir) == ("it's", "gs://bucket/my runs")
        assert config.distributed.initialize == "true"
    assert "--dry-run" in _remote(stand_ins.calls()[-1])


@pytest.fixture
def host(stand_ins, tmp_path):
    """A gcloud whose only host is a directory of this machine; returns that host's home."""
    home = tmp_path / "home"
    (home / "hybridnorm_jax/.venv/bin").mkdir(parents=True)
    ssh = f'cd {home} && exec bash -c "${{word#--command=}}"'
    scp = f'cp "$5" "{home}/${{6#*:}}"'
    stand_ins.add("gcloud", script=f"[ $4 = scp ] && {scp}\nfor word; do case $word in --command=*) {ssh};; esac; done")
    return home


def test_it_detaches_refuses_a_second_start_and_stops(stand_ins, host):
    program = host / "hybridnorm_jax/.venv/bin/hybridnorm"
    program.write_text(
        "#!/bin/bash\necho told \"$@\"\ntrap 'echo saved; exit 75' TERM\nwhile true; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    assert "not training" in stand_ins.run(SCRIPT, "status", **TPU).stdout
    started = stand_ins.run(SCRIPT, "start", "550m", **TPU)
    assert started.returncode == 0, started.stderr
    try:
        second = stand_ins.run(SCRIPT, "start", "550m", **TPU)
        assert second.returncode != 0
        assert "already training" in second.stderr
        assert ": training" in stand_ins.run(SCRIPT, "status", **TPU).stdout
    finally:
        stopped = stand_ins.run(SCRIPT, "stop", **TPU)
    assert stopped.returncode == 0
    log = host / "hybridnorm_jax/train.log"
    end = time.monotonic() + 30
    while "saved" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    told = "told train 550m run.dir=gs://bucket/my runs distributed.initialize=true"
    assert log.read_text().splitlines() == [told, "saved"]


def test_the_users_own_files_are_on_the_hosts_and_those_deleted_are_gone(stand_ins, host, tmp_path):
    program = host / "hybridnorm_jax/.venv/bin/hybridnorm"
    program.write_text("#!/bin/bash\ncd files && echo $(find . -type f | sort)\n")
    program.chmod(0o755)
    own = tmp_path / "my files"
    own.mkdir()
    for name in ("own.yaml", "my norm.py", "old.py"):
        (own / name).write_text("x")
    first = stand_ins.run(SCRIPT, "dry-run", "files/own.yaml", FILES=str(own), **TPU)
    assert first.stdout == "./my norm.py ./old.py ./own.yaml\n", first.stderr
    (own / "old.py").unlink()
    second = stand_ins.run(SCRIPT, "dry-run", "files/own.yaml", FILES=str(own), **TPU)
    assert second.stdout == "./my norm.py ./own.yaml\n"
    refused = stand_ins.run(SCRIPT, "dry-run", "550m", FILES=str(own / "nowhere"), **TPU)
    assert refused.returncode == 2
    assert refused.stderr == f"error: FILES={own}/nowhere: must be a directory\n"


def test_install_copies_the_commit_and_says_what_stays_here(stand_ins, host, tmp_path):
    """From a clone with a file that is not committed; the host has a file of an older commit."""
    clone = tmp_path / "clone"
    (clone / "launch").mkdir(parents=True)
    (clone / "launch/tpu_vm.sh").write_text(SCRIPT.read_text())
    (clone / "hybridnorm_jax").mkdir()
    (clone / "hybridnorm_jax/__init__.py").write_text("")
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (clone / "own.yaml").write_text("")
    (host / "hybridnorm_jax/hybridnorm_jax").mkdir()
    (host / "hybridnorm_jax/hybridnorm_jax/old.py").write_text("")
    python = host / "hybridnorm_jax/.venv/bin/python"
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    made = stand_ins.run(clone / "launch/tpu_vm.sh", "install", PYTHON="true", **TPU)
    assert made.returncode == 0, made.stderr
    assert "changes that are not committed stay here" in made.stderr
    assert "-m pip install --quiet -e .[tpu]" in made.stdout
    assert sorted(os.listdir(host / "hybridnorm_jax")) == [".venv", "hybridnorm_jax", "launch"]
    assert os.listdir(host / "hybridnorm_jax/hybridnorm_jax") == ["__init__.py"]


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
def test_it_says_what_is_missing(words, environ, message, stand_ins):
    stand_ins.add("gcloud")
    ended = stand_ins.run(SCRIPT, *words, **environ)
    assert ended.returncode == 2
    assert message in ended.stderr
