"""The start of 64 processes: their numbers, JAX's coordination service, and what they agree on.

They are threads of this process. Each has an environment, a number and a disk of its own; what they gather goes through
a list instead of devices. 64 programs with JAX and devices would take minutes.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster, ompi_cluster, slurm_cluster
from jax._src.lib import _jax
from jax.experimental import multihost_utils
from processes import free_port

from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.cluster import DistributedSection, RuntimeArguments, find_cluster, runtime_arguments
from hybridnorm_jax.mesh.messages import all_texts, bytes_of, text_of
from hybridnorm_jax.mesh.processes import check_alike
from hybridnorm_jax.training.local_checkpoints import LocalCheckpoints

COUNT = 64


def _slurm(number):
    """Eight nodes of eight GPUs."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[1-8]",
        "SLURM_STEP_NUM_TASKS": "64",
        "SLURM_NTASKS": "64",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number % 8),
    }


def _gke(number):
    """Four slices of sixteen hosts."""
    return {
        "TPU_WORKER_HOSTNAMES": ",".join(f"slice-{number // 16}-{host}.big" for host in range(16)),
        "TPU_WORKER_ID": str(number % 16),
        "TPU_SKIP_MDS_QUERY": "true",
        "MEGASCALE_NUM_SLICES": "4",
        "MEGASCALE_SLICE_ID": str(number // 16),
        "MEGASCALE_COORDINATOR_ADDRESS": "slice-0-0.big:8080",
    }


def _open_mpi(number):
    return {
        "OMPI_COMM_WORLD_SIZE": "64",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number % 8),
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    }


OF_JAX = {
    _slurm: slurm_cluster.SlurmCluster,
    _gke: cloud_tpu_cluster.GkeTpuCluster,
    _open_mpi: ompi_cluster.OmpiCluster,
}


@pytest.mark.parametrize("environ_of", OF_JAX, ids=lambda function: function.__name__)
def test_every_process_finds_its_number_as_jax_does(environ_of, monkeypatch):
    cluster, coordinators = OF_JAX[environ_of], set()
    for number in range(COUNT):
        environ = environ_of(number)
        found = find_cluster(environ, tpu=environ_of is _gke)
        assert (found.num_processes, found.process_id) == (COUNT, number)
        # JAX is left to find them: it is not given what it knows.
        assert runtime_arguments(DistributedSection(initialize="true"), environ, tpu=environ_of is _gke) == (
            RuntimeArguments()
        )
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            assert (cluster.get_process_count(), cluster.get_process_id()) == (COUNT, number)
            if environ_of is not _gke:  # there it is looked up by its name
                coordinators.add(cluster.get_coordinator_address(timeout_secs=1, override_coordinator_port=None))
    assert len(coordinators) == (environ_of is not _gke)


def test_jaxs_coordination_service_brings_them_together():
    port = free_port()
    limits = {"heartbeat_timeout": 100, "shutdown_timeout": 60}
    service = _jax.get_distributed_runtime_service(f"127.0.0.1:{port}", COUNT, **limits)

    def live(number):
        client = _jax.get_distributed_runtime_client(f"127.0.0.1:{port}", number, init_timeout=60, **limits)
        client.connect()
        client.key_value_set(f"here/{number}", str(number))
        client.wait_at_barrier("all are here", 60_000, None)
        there = client.key_value_dir_get("here/")
        client.shutdown()
        return len(there)

    with ThreadPoolExecutor(COUNT) as pool:
        assert list(pool.map(live, range(COUNT))) == [COUNT] * COUNT
    service.shutdown()


@pytest.fixture
def together(monkeypatch):
    """Runs a function of a process's number in 64 threads that take each other for processes; returns the results."""
    here, barrier = threading.local(), threading.Barrier(COUNT, timeout=60)
    shown = [None] * COUNT

    def gather(value):
        shown[here.number] = np.array(value)
        barrier.wait()
        gathered = np.stack(shown)
        barrier.wait()
        return gathered

    monkeypatch.setattr(jax, "process_count", lambda: COUNT)
    monkeypatch.setattr(jax, "process_index", lambda: here.number)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)

    def broadcast(value, is_source):
        rows, sources = gather(value), gather(np.asarray(is_source))
        return rows[int(np.flatnonzero(sources)[0])]

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)

    def run(function):
        def of_process(number):
            here.number = number
            return function(number)

        with ThreadPoolExecutor(COUNT) as pool:
            return list(pool.map(of_process, range(COUNT)))

    return run


def test_one_of_them_with_another_argument_is_named_in_all(together):
    def of_process(number):
        try:
            check_alike({"train.seed": "0", "train.batch_size": "1024" if number != 41 else "1023", "run.name": "big"})
        except ConfigError as error:
            return str(error)

    (line,) = set(together(of_process))
    right = "every argument except distributed.* and data.cache_dir must be the same"
    assert line == f"train.batch_size: not the same in all processes; {right}"
    assert together(lambda number: check_alike({"train.seed": "0"})) == [None] * COUNT


def test_texts_of_all_lengths_arrive(together):
    texts = ["ä" * number for number in range(COUNT)]
    assert together(lambda number: all_texts(texts[number])) == [texts] * COUNT
    assert together(lambda number: text_of(63, texts[number])) == [texts[63]] * COUNT
    data = np.arange(1000, dtype=np.uint8)
    received = together(lambda number: bytes_of(5, data if number == 5 else None, data.size))
    assert all(np.array_equal(each, data) for each in received)


def test_they_look_for_the_same_local_steps_whatever_is_left_on_their_disks(together, tmp_path):
    """Host 3 has lost its disk, and host 9 has a step more."""

    def of_process(number):
        with LocalCheckpoints(str(tmp_path / str(number)), run="big-0") as local:
            attempt = local._attempt
            steps = () if number == 3 else (100, 200, 300) if number == 9 else (100, 200)
            for step in steps:
                (tmp_path / str(number) / "big-0" / f"{step:06d}-{'0' * 16}").mkdir()
            return attempt, local._starts(after=100)

    results = together(of_process)
    assert len({attempt for attempt, _ in results}) == 1
    assert [starts for _, starts in results] == [[(300, "0" * 16), (200, "0" * 16)]] * COUNT
