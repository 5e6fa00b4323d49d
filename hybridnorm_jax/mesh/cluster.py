"""Which launcher started this process, and what that says of the other processes of its run.

What the environment variables of Open MPI, SLURM and GKE mean is JAX's definition (jax._src.clusters, 0.10.2).
"""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping

from hybridnorm_jax.config_fields import check, check_choice, check_fields, key
from hybridnorm_jax.errors import ConfigError

COORDINATOR_VARIABLE = "JAX_COORDINATOR_ADDRESS"


@dataclasses.dataclass(frozen=True)
class DistributedSection:
    """The processes of a run on several hosts. Cloud TPU, GKE, SLURM and Open MPI name them; see docs/clusters.md."""

    initialize: str = key("auto", "auto: if there are several processes | true | false: this process is alone")
    coordinator: str | None = key(None, "host:port where process 0 listens; null: found, see docs/clusters.md")
    num_processes: int | None = key(
        None, "number of processes on all hosts; null: found", at_least=1, at_most=1_000_000
    )
    process_id: int | None = key(None, "number of this process, from 0; null: found", at_least=0, at_most=1_000_000)
    timeout_seconds: int = key(
        300, "how long processes wait for each other at the start", at_least=1, at_most=1_000_000
    )
    heartbeat_seconds: int = key(
        100,
        "a process that is silent for this long counts as dead, and the others are ended",
        at_least=1,
        at_most=1_000_000,
    )

    def __post_init__(self):
        check_fields("distributed", self)
        check_choice("distributed.initialize", self.initialize, ("auto", "true", "false"))
        if self.coordinator is not None:
            is_address = re.fullmatch(r"\S+:\d{1,5}", self.coordinator) is not None
            right = "must be host:port, such as 10.0.0.2:8476"
            check(is_address, "distributed.coordinator", self.coordinator, right)
        count, number = self.num_processes, self.process_id
        if count is None:
            check(number is None, "distributed.process_id", number, "needs distributed.num_processes")
        elif number is None:
            check(False, "distributed.num_processes", count, "needs distributed.process_id")
        else:
            right = f"must be in [0, distributed.num_processes={count})"
            check(0 <= number < count, "distributed.process_id", number, right)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What a launcher says about this process.

    Attributes:
      name: of the launcher, for messages.
      num_processes: of the run; None where only the cluster's own service knows it.
      process_id: this process's number; None where only the cluster's own service knows it.
      has_coordinator: whether JAX can find out where process 0 is.
      local_id: this process's number on its host, where every process has one GPU.
    """

    name: str
    num_processes: int | None
    process_id: int | None
    has_coordinator: bool = True
    local_id: int | None = None


@dataclasses.dataclass(frozen=True)
class RuntimeArguments:
    """The arguments of jax.distributed.initialize; None: JAX finds them."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_id: int | None = None


def find_cluster(environ: Mapping[str, str], *, tpu: bool) -> Cluster | None:
    """The launcher that started this process, None where it was started by hand.

    Args:
      environ: the environment variables.
      tpu: whether JAX will use TPUs here.

    Raises:
      ConfigError: in an indexed Kubernetes job without TPUs, where the package for asking Kubernetes is missing.
    """
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _open_mpi(environ)
    if all(f"SLURM_{name}" in environ for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")):
        return _slurm(environ)
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if tpu and hosts:
        return _gke(environ, hosts_of_slice=len(hosts.split(",")))
    if tpu and "TPU_SKIP_MDS_QUERY" not in environ:  # JAX sets it where there is no TPU
        return Cluster(name="Cloud TPU", num_processes=None, process_id=None)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return _kubernetes(environ)
    return None


def _open_mpi(environ: Mapping[str, str]) -> Cluster:
    return Cluster(
        name="Open MPI",
        num_processes=int(environ["OMPI_COMM_WORLD_SIZE"]),
        process_id=int(environ["OMPI_COMM_WORLD_RANK"]),
        has_coordinator="OMPI_MCA_orte_hnp_uri" in environ,  # which Open MPI 5 no longer sets
        local_id=int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),
    )


def _slurm(environ: Mapping[str, str]) -> Cluster:
    return Cluster(
        name="SLURM",
        # In the shell of `salloc --ntasks=4` SLURM_NTASKS is 4, but the step is that one shell.
        num_processes=int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])),
        process_id=int(environ["SLURM_PROCID"]),
        local_id=int(environ["SLURM_LOCALID"]),
    )


def _gke(environ: Mapping[str, str], *, hosts_of_slice: int) -> Cluster:
    """TPUs on GKE: one or several slices of equally many hosts."""

    def number(name: str, default: int) -> int:
        return int(environ.get(name) or default)

    return Cluster(
        name="GKE",
        num_processes=number("MEGASCALE_NUM_SLICES", 1) * hosts_of_slice,
        process_id=number("MEGASCALE_SLICE_ID", 0) * hosts_of_slice + number("TPU_WORKER_ID", 0),
    )


def _kubernetes(environ: Mapping[str, str]) -> Cluster:
    if importlib.util.find_spec("kubernetes") is None:
        right = "pip install 'jax[k8s]' lets JAX find the others, distributed.initialize=false trains alone"
        raise ConfigError(f"distributed.initialize=auto: this is a pod of an indexed Kubernetes job; {right}")
    return Cluster(name="Kubernetes", num_processes=None, process_id=int(environ["JOB_COMPLETION_INDEX"]))


def runtime_arguments(section: DistributedSection, environ: Mapping[str, str], *, tpu: bool) -> RuntimeArguments | None:
    """What to start JAX's runtime with; None where this process is alone.

    Raises:
      ConfigError: something is given, but not enough to start with.
    """
    if section.initialize == "false":
        return None
    coordinator, source = section.coordinator, f"distributed.coordinator={section.coordinator}"
    if coordinator is None and environ.get(COORDINATOR_VARIABLE):
        coordinator = environ[COORDINATOR_VARIABLE]
        source = f"{COORDINATOR_VARIABLE}={coordinator}"
    if section.num_processes is not None:
        if coordinator is None:
            right = "needs distributed.coordinator=HOST:PORT, where process 0 is to listen"
            raise ConfigError(f"distributed.num_processes={section.num_processes}: {right}")
        return RuntimeArguments(coordinator, num_processes=section.num_processes, process_id=section.process_id)
    cluster = find_cluster(environ, tpu=tpu)
    if coordinator is None:
        return _found_by_jax(section, cluster)
    if cluster is None or cluster.num_processes is None:
        right = "needs distributed.num_processes and distributed.process_id too, no SLURM or Open MPI gives them"
        raise ConfigError(f"{source}: {right}")
    return RuntimeArguments(
        coordinator,
        num_processes=cluster.num_processes,
        process_id=cluster.process_id,
        local_id=cluster.local_id,
    )


def _found_by_jax(section: DistributedSection, cluster: Cluster | None) -> RuntimeArguments | None:
    """Where nothing is given: no arguments, if the cluster tells JAX all of them; None where this process is alone."""
    if cluster is None:
        if section.initialize == "true":
            right = "found no Open MPI, SLURM, GKE, Cloud TPU or Kubernetes job; give distributed.coordinator=HOST:PORT"
            raise ConfigError(f"distributed.initialize=true: {right}")
        return None
    if cluster.num_processes == 1 and section.initialize == "auto":
        return None
    if not cluster.has_coordinator:
        right = "give distributed.coordinator=HOST:PORT, with the host of rank 0"
        raise ConfigError(f"distributed: Open MPI 5 does not tell its {cluster.num_processes} processes; {right}")
    return RuntimeArguments()
