"""Every command of docs/clusters.md is run by a shell, with stand-ins for the programs of clusters.

The scripts in launch/ are the real ones. What they and the page call is compared: with `hybridnorm train` itself, with
Dockerfile, and for other people's programs with OPTIONS, which was written by hand from their documentation.
"""

import re
import shlex
import subprocess

import pytest
import yaml
from pages import REPOSITORY, blocks
from stand_ins import StandIns

from hybridnorm_jax.commands import main as program
from hybridnorm_jax.config.arguments import parse

PAGE = REPOSITORY / "docs/clusters.md"
BLOCKS = [block for block in blocks(PAGE) if block.language == "bash"]
STAND_INS = ("docker", "gcloud", "hybridnorm", "kubectl", "sbatch", "sky", "xpk")
# What a command of another program begins with -> the options that it has, as far as they are used.
OPTIONS = {
    "docker build": {"--build-arg", "--tag"},
    "docker push": set(),
    "docker run": {"--rm", "--gpus", "--shm-size"},
    "gcloud compute tpus tpu-vm scp": {"--zone", "--worker", "--project"},
    "gcloud compute tpus tpu-vm ssh": {"--zone", "--worker", "--project", "--command"},
    "gcloud container clusters update": {"--location", "--workload-pool", "--update-addons"},
    "gcloud container node-pools create": {
        "--cluster",
        "--location",
        "--node-locations",
        "--machine-type",
        "--tpu-topology",
        "--num-nodes",
        "--workload-metadata",
    },
    "gcloud iam service-accounts add-iam-policy-binding": {"--role", "--member"},
    "gcloud storage buckets add-iam-policy-binding": {"--role", "--member"},
    "kubectl annotate serviceaccount": set(),
    "kubectl apply": {"--filename"},
    "kubectl create serviceaccount": set(),
    "kubectl delete configmap": {"--ignore-not-found"},
    "kubectl delete jobset": set(),
    "kubectl get": {"--ignore-not-found", "--output", "--selector"},
    "kubectl logs": {"--follow", "--container", "--tail", "--selector"},
    "sky jobs launch": {"--gpus", "--num-nodes", "--env"},
    "sky launch": {"--gpus", "--num-nodes", "--env"},
    "xpk workload create": {
        "--cluster",
        "--workload",
        "--docker-image",
        "--tpu-type",
        "--num-slices",
        "--max-restarts",
        "--restart-on-exit-codes",
        "--termination-grace-period-seconds",
        "--project",
        "--zone",
        "--command",
    },
}


def test_the_page_has_commands_for_each_launch_file():
    text = "".join(block.text for block in BLOCKS)
    for file in (REPOSITORY / "launch").iterdir():
        assert file.name == "gke_jobset.yaml" or f"launch/{file.name}" in text, file


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_shell_runs_every_command(block, workplace, tmp_path):
    workplace(PAGE)
    stand_ins = StandIns(tmp_path)
    for name in STAND_INS:
        stand_ins.add(name, script="[[ $1 = apply ]] && cat > applied.yaml" if name == "kubectl" else "")
    ended = subprocess.run(["bash", "-euc", block.text], env=stand_ins.environ, check=False)
    assert ended.returncode == 0
    calls = stand_ins.calls()
    assert calls
    for name, *words in calls:
        if name == "hybridnorm":
            _check_train(words)
        elif name == "sbatch":
            assert (REPOSITORY / words[0]).is_file()
            _check_train(["train", *words[1:]])
        else:
            _check_options(shlex.join([name, *words]))
            _check_arguments(name, words)
    if (tmp_path / "applied.yaml").exists():
        job = yaml.safe_load((tmp_path / "applied.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        _check_train(["train", *shlex.split(container["env"][0]["value"])])


def _check_train(words):
    assert words[0] == "train"
    parse([word for word in words[1:] if word != "--dry-run"])


def _check_options(line):
    """The program has this command with these options."""
    (start,) = [start for start in OPTIONS if line.startswith(f"{start} ")]
    words = shlex.split(line.removeprefix(start))
    if start == "docker run":  # options of the image's own program come after its name
        words = words[: words.index("REGISTRY/hybridnorm:tpu")]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= OPTIONS[start], line


def _check_arguments(name, words):
    """Arguments for our own program and image within those for another one."""
    if name == "docker" and words[0] == "build":
        named = {word.partition("=")[0] for word in words[1:] if re.match(r"[A-Z_]+=", word)}
        assert named <= set(re.findall(r"^ARG (\w+)", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE))
    if name == "docker" and words[0] == "run":
        assert words[-1] in program.COMMANDS
    for word in words:
        if word.startswith("ARGUMENTS="):
            _check_train(["train", *shlex.split(word.removeprefix("ARGUMENTS="))])
        if word.startswith("--command=exec hybridnorm "):
            _check_train(shlex.split(word)[2:])
