"""Which launcher started a process, what JAX is started with, and what is refused before anything starts."""

import pytest

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh import cluster
from hybridnorm_jax.mesh.cluster import DistributedSection, RuntimeArguments, find_cluster, runtime_arguments

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
OPEN_MPI_4 = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}
GIVEN = {"coordinator": "10.0.0.2:8476", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("environ", "tpu", "found"),
    [
        ({}, False, None),
        (SLURM, False, ("SLURM", 4, 3)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False, ("SLURM", 1, 3)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, None),  # sbatch without srun
        (OPEN_MPI_4, False, ("Open MPI", 4, 2)),
        (GKE, True, ("GKE", 2, 1)),
        (GKE, False, None),
        ({**GKE, "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}, True, ("GKE", 6, 5)),
        ({}, True, ("Cloud TPU", None, None)),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
    ],
    ids=str,
)
def test_launchers_are_told_apart(environ, tpu, found):
    cluster = find_cluster(environ, tpu=tpu)
    assert (cluster and (cluster.name, cluster.num_processes, cluster.process_id)) == found


@pytest.mark.parametrize(
    ("section", "environ", "start"),
    [
        ({}, {}, None),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {**OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"initialize": "false"}, SLURM, None),
        ({}, SLURM, RuntimeArguments()),
        (GIVEN, {}, RuntimeArguments("10.0.0.2:8476", 2, 1)),
        (GIVEN, SLURM, RuntimeArguments("10.0.0.2:8476", 2, 1)),
        ({"coordinator": "h:1"}, SLURM, RuntimeArguments("h:1", 4, 3, 1)),
        ({"coordinator": "h:1"}, OPEN_MPI, RuntimeArguments("h:1", 4, 2, 0)),
        ({"num_processes": 2, "process_id": 0}, {"JAX_COORDINATOR_ADDRESS": "h:1"}, RuntimeArguments("h:1", 2, 0)),
    ],
    ids=str,
)
def test_what_is_started(section, environ, start):
    assert runtime_arguments(DistributedSection(**section), environ, tpu=False) == start


@pytest.mark.parametrize(
    ("section", "environ", "message"),
    [
        ({"coordinator": "h:1"}, {}, r"distributed.coordinator=h:1: needs distributed.num_processes and"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "h:1"}, r"JAX_COORDINATOR_ADDRESS=h:1: needs distributed.num_processes"),
        ({"num_processes": 2, "process_id": 0}, {}, r"distributed.num_processes=2: needs distributed.coordinator"),
        ({"initialize": "true"}, {}, r"distributed.initialize=true: found no Open MPI, SLURM, GKE"),
        ({}, OPEN_MPI, r"Open MPI 5 does not tell its 4 processes; give distributed.coordinator=HOST:PORT"),
    ],
    ids=str,
)
def test_too_little_is_refused_before_anything_starts(section, environ, message):
    with pytest.raises(ConfigError, match=message):
        runtime_arguments(DistributedSection(**section), environ, tpu=False)


def test_an_indexed_kubernetes_job_needs_the_package_that_jax_asks_with(monkeypatch):
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"indexed Kubernetes job; pip install 'jax\[k8s\]'"):
        find_cluster(environ, tpu=False)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    assert find_cluster(environ, tpu=False).process_id == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**GIVEN, "process_id": 2}, r"process_id=2: must be in \[0, distributed.num_processes=2\)"),
        ({**GIVEN, "process_id": -1}, r"process_id=-1: must be at least 0"),
        ({**GIVEN, "process_id": None}, r"num_processes=2: needs distributed.process_id"),
        ({**GIVEN, "num_processes": None}, r"process_id=1: needs distributed.num_processes"),
        ({"coordinator": "10.0.0.2"}, r"coordinator=10.0.0.2: must be host:port"),
        ({"initialize": "yes"}, r"distributed.initialize=yes: not known"),
        ({"timeout_seconds": 0}, r"timeout_seconds=0: must be at least 1"),
    ],
    ids=str,
)
def test_keys_are_checked(keys, message):
    with pytest.raises(ConfigError, match=message):
        DistributedSection(**keys)
