"""launch/gke.sh and gke_jobset.yaml: a JobSet by its schema, whose pods run `hybridnorm train` with what was asked."""

import copy
import subprocess

import pytest
import yaml
from stand_ins import LAUNCH

from hybridnorm_jax.config.arguments import parse

SCRIPT = LAUNCH / "gke.sh"
ASKED = {
    "RUN_NAME": "big",
    "RUN_DIR": "gs://bucket/my runs",
    "DATA_BUCKET": "data",
    "IMAGE": "registry/hybridnorm:tpu",
    "TOPOLOGY": "8x8",
    "SLICES": "2",
}
AWKWARD = (
    "550m",
    "data.files=[/data/a b/*.npy]",
    "mesh.replica=2",
    "train.sample_tokens=1",
    "train.sample_prompt=it's $HOME\n`x`",
)


@pytest.fixture
def jobset(stand_ins):
    rendered = stand_ins.run(SCRIPT, "render", *AWKWARD, **ASKED)
    assert rendered.returncode == 0, rendered.stderr
    return yaml.safe_load(rendered.stdout)


def _round_trip(jobset):
    """A JobSet as the models that Kubeflow makes from the API's schema read and write it: they drop unknown keys."""
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    return JobsetV1alpha2JobSet.from_dict(copy.deepcopy(jobset)).to_dict()


def _pod(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_it_is_a_jobset_by_its_schema(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert _round_trip(jobset) == jobset


def test_the_schema_finds_faults(jobset):
    """A key that there is not is dropped, and a value of another type refused: what the test above relies on."""
    misspelled = copy.deepcopy(jobset)
    _pod(misspelled)["containers"][0]["securitycontext"] = {}
    assert _round_trip(misspelled) != misspelled
    wrong = copy.deepcopy(jobset)
    wrong["spec"]["replicatedJobs"][0]["replicas"] = "two"
    with pytest.raises(ValueError, match="replicas"):
        _round_trip(wrong)


def test_slices_hosts_and_chips_are_those_of_the_topology(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8 * 8 / 4
    (container,) = _pod(jobset)["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["image"] == "registry/hybridnorm:tpu"
    (policy,) = job["podFailurePolicy"]["rules"]
    assert (policy["onExitCodes"]["values"], policy["onExitCodes"]["containerName"]) == ([2], container["name"])


def test_the_pod_has_the_rights_of_its_service_account(jobset):
    """On the host's network it would have those of the node, and the mount of the bucket would fail."""
    pod = _pod(jobset)
    assert pod["serviceAccountName"] == "trainer"
    assert "hostNetwork" not in pod
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_container_trains_with_the_arguments_as_they_are(jobset, stand_ins):
    (container,) = _pod(jobset)["containers"]
    (variable,) = container["env"]
    # What Kubernetes would fill in itself. A backslash of the quoting stands between the two characters.
    assert "$(" not in variable["value"]
    stand_ins.add("hybridnorm", status=75)
    limits = {"BASH_FUNC_ulimit%%": "() { true; }"}
    command = [*container["command"], *container["args"]]
    ended = subprocess.run(command, env=stand_ins.environ | limits | {variable["name"]: variable["value"]}, check=False)
    assert ended.returncode == 75
    ((name, train, *arguments),) = stand_ins.calls()
    assert (name, train, tuple(arguments[: len(AWKWARD)])) == ("hybridnorm", "train", AWKWARD)
    config = parse(arguments)
    assert (config.run.name, config.run.dir) == ("big", "gs://bucket/my runs")
    assert config.distributed.initialize == "true"


def test_a_pod_that_may_not_lock_memory_ends_as_with_wrong_input(jobset, stand_ins):
    (container,) = _pod(jobset)["containers"]
    stand_ins.add("hybridnorm")
    command = [*container["command"], *container["args"]]
    limits = {"BASH_FUNC_ulimit%%": "() { echo not permitted >&2; false; }"}
    ended = subprocess.run(command, env=stand_ins.environ | limits, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, b"not permitted\n")
    assert not stand_ins.calls()


def test_start_applies_the_users_files_and_then_the_jobset(stand_ins, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "norm.py").write_text("x = 1\n")
    stand_ins.add("kubectl", script=f"[ $1 = apply ] && cat >> {tmp_path}/applied")
    started = stand_ins.run(SCRIPT, "start", "files/own.yaml", FILES=str(own), **ASKED)
    assert started.returncode == 0, started.stderr
    asked, create, *applied = sorted(stand_ins.calls(), key=lambda call: call[1] == "apply")
    if asked[1] == "create":
        asked, create = create, asked
    assert asked == ["kubectl", "get", "jobset", "big", "--ignore-not-found", "--output=name"]
    assert create[1:5] == ["create", "configmap", "big-files", f"--from-file={own}"]
    assert applied == [["kubectl", "apply", "--filename=-"]] * 2
    assert yaml.safe_load((tmp_path / "applied").read_text())["metadata"]["name"] == "big"
    volumes = {volume["name"]: volume for volume in _pod(yaml.safe_load((tmp_path / "applied").read_text()))["volumes"]}
    assert volumes["files"]["configMap"]["name"] == create[3]


def test_a_start_without_files_does_not_mount_those_of_the_start_before(stand_ins):
    stand_ins.add("kubectl", script="[ $1 = apply ] && cat > /dev/null")
    assert stand_ins.run(SCRIPT, "start", "550m", **ASKED).returncode == 0
    assert [call[1:] for call in stand_ins.calls()][1:] == [
        ["delete", "configmap", "big-files", "--ignore-not-found"],
        ["apply", "--filename=-"],
    ]


def test_a_jobset_of_that_name_is_not_applied_over(stand_ins):
    stand_ins.add("kubectl", script="[ $1 = get ] && echo jobset.jobset.x-k8s.io/big")
    refused = stand_ins.run(SCRIPT, "start", "550m", **ASKED)
    assert refused.returncode == 2
    assert refused.stderr == "error: there is a JobSet big already: launch/gke.sh stop deletes it, the run stays\n"
    assert len(stand_ins.calls()) == 1


def test_status_log_and_stop_name_the_run(stand_ins):
    stand_ins.add("kubectl")
    for action in ("status", "log", "stop"):
        assert stand_ins.run(SCRIPT, action, RUN_NAME="big").returncode == 0
    jobset, pods, log, stop, files = stand_ins.calls()
    assert jobset[1:] == ["get", "jobset", "big"]
    assert pods[1:] == ["get", "pods", "--selector=jobset.sigs.k8s.io/jobset-name=big"]
    assert log[1] == "logs"
    assert stop[1:] == ["delete", "jobset", "big"]
    assert files[1:] == ["delete", "configmap", "big-files", "--ignore-not-found"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RUN_NAME": ""}, "RUN_NAME is not set: RUN_NAME=... launch/gke.sh"),
        ({"RUN_NAME": "Big_run"}, "RUN_NAME=Big_run: must be at most 40 small letters, digits and '-'"),
        ({"RUN_DIR": "runs"}, "RUN_DIR=runs: all pods must see it: gs://BUCKET/runs"),
        ({"TOPOLOGY": "v6e-64"}, "TOPOLOGY=v6e-64: must be such as 8x8 or 4x4x8"),
        ({"TOPOLOGY": "08x8"}, "TOPOLOGY=08x8: must be such as 8x8 or 4x4x8"),
        ({"TOPOLOGY": f"8x{10**20}"}, f"TOPOLOGY=8x{10**20}: must be such as 8x8 or 4x4x8"),
        ({"SLICES": "0"}, "SLICES=0: must be a number from 1"),
        ({"CHIPS_PER_HOST": "5"}, "CHIPS_PER_HOST=5: must divide the 64 chips of TOPOLOGY"),
        ({"FILES": "/nowhere"}, "FILES=/nowhere: must be a directory"),
    ],
    ids=str,
)
def test_a_wrong_variable_is_named_before_anything_is_applied(change, message, stand_ins):
    stand_ins.add("kubectl")
    ended = stand_ins.run(SCRIPT, "start", "550m", **ASKED | change)
    assert (ended.returncode, ended.stderr) == (2, f"error: {message}\n")
    assert not stand_ins.calls()
    assert stand_ins.run(SCRIPT, "start", **ASKED).returncode == 2
