"""The processes of one run: how they find each other, who speaks, and how they end together.

JAX's runtime is started at most once, before any backend, and only where there are others to wait for. What the
environment variables of Open MPI, SLURM and GKE mean is JAX's definition (jax._src.clusters, 0.10.2). Where a start or
an end cannot succeed, JAX's C++ runtime aborts the process with a stack trace and status 134, so both are watched from
here and given up a moment earlier. docs/clusters.md has the user's side.
"""

import contextlib
import hashlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from hybridnorm_jax.errors import ConfigError, RunStopped, UserError
from hybridnorm_jax.mesh.cluster import DistributedSection, Start, find_cluster, resolve

# A process that fails waits so long for the others to fail alike, such as at a mesh that does not fit the devices.
ALIKE_SECONDS = 5
# And after so long the coordinator ends those that did not. Larger, so that the failing one keeps its own exit status.
SHUTDOWN_SECONDS = 15
# A run that is told to stop gives its processes so long to close their files; where one was not told, no longer.
STOPPED_SECONDS = 30
# JAX aborts at its own limit, so it is given a later one.
LATER_SECONDS = 60
COORDINATOR_VARIABLE = "JAX_COORDINATOR_ADDRESS"


class Processes:
    """This process among those of its run; one object for each command.

    Attributes:
      number: 0 where it is alone, and while nobody knows.
      count: how many there are, None before they have met.
    """

    def __init__(self, arguments: Sequence[str] = ()):
        self.number, self.count = _early_number(arguments), None
        self._runs = False  # JAX's runtime, started here
        self._alike = True  # whether all processes ended together, or this one has not started

    @contextlib.contextmanager
    def running(self, section: DistributedSection) -> Iterator[None]:
        """JAX's runtime, where there is more than this process; at the end they part together.

        Raises:
          ConfigError: see `resolve`.
          UserError: the others were not there in time.
        """
        start = resolve(section, os.environ, tpu=_has_tpu())
        if start is not None:
            self._start(section, start)
            self.number, self.count = jax.process_index(), jax.process_count()
        try:
            yield
            if self._runs:
                # Without a limit: process 0 may still be handing its metrics to a service.
                multihost_utils.sync_global_devices("end of the run")
        except RunStopped:
            if self._runs:
                _within(STOPPED_SECONDS, lambda: multihost_utils.sync_global_devices("end of the stopped run"))
            raise
        finally:
            if self._runs:
                self._part()

    def speaks(self, error: BaseException) -> bool:
        """Whether this process prints the line of an error.

        Process 0 speaks for all, but not for what may be one host's alone: an error of a file, or one that the others
        did not have.
        """
        return self.number == 0 or error.__cause__ is not None or isinstance(error, OSError) or not self._alike

    def supervise(self, command: Callable[[], int]) -> int:
        """The exit status that `command` returns; where the others have not ended, ends this process with it at once.

        Otherwise Python's own end would wait for the others and then be aborted, its status lost.
        """
        try:
            status = command()
        except BaseException:
            if self._runs:
                traceback.print_exc()
                _leave(1)
            raise
        if self._runs:
            _leave(status)
        return status

    def label(self, line: str) -> str:
        """A line of this process, with its number where it does not speak for all."""
        return line if self.number == 0 else f"process {self.number}: {line}"

    def _start(self, section: DistributedSection, start: Start) -> None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        self._runs = True
        self._alike = False
        local = None if start.local_id is None or "JAX_LOCAL_DEVICE_IDS" in os.environ else [start.local_id]
        arguments = {
            "coordinator_address": start.coordinator,
            "num_processes": start.num_processes,
            "process_id": start.process_id,
            "local_device_ids": local,
            # Numbers that were given are not to be completed by a cluster's.
            "cluster_detection_method": None if start.coordinator is None else "deactivate",
            "initialization_timeout": section.timeout_seconds + LATER_SECONDS,
            "heartbeat_timeout_seconds": section.heartbeat_seconds,
            "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
        }
        with _handler_kept(signal.SIGTERM):
            failed = _within(section.timeout_seconds, lambda: jax.distributed.initialize(**arguments))
        if failed is None:
            return
        who = "this process" if start.process_id is None else f"process {start.process_id} of {start.num_processes}"
        where = "the coordinator" if start.coordinator is None else start.coordinator
        if isinstance(failed, TimeoutError):
            limit = f"within {section.timeout_seconds} seconds (distributed.timeout_seconds)"
            if start.process_id == 0:
                raise UserError(f"distributed: {who}, at {where}, was not joined by all others {limit}")
            right = "is process 0 running, is its port reachable, do all agree on their number?"
            raise UserError(f"distributed: {who} did not meet the others at {where} {limit}: {right}")
        reason = (str(failed).splitlines() or [""])[0] or type(failed).__name__
        right = "distributed.initialize=false trains on this process alone"
        raise UserError(f"distributed: {who} cannot start at {where}: {reason}; {right}") from failed

    def _part(self) -> None:
        """Shut JAX's runtime down, which waits for all processes, but not longer than it takes if they end alike."""
        if not jax.distributed.is_initialized():
            return
        self._alike = _within(ALIKE_SECONDS, jax.distributed.shutdown) is None
        self._runs = not self._alike


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print on process 0 alone; `file` is standard output by default. JAX's runtime runs already, if it is to run."""
    if jax.process_index() == 0:
        print(text, file=file, flush=True)


def check_alike(values: Mapping[str, str]) -> None:
    """Compare what all processes were told, key by key; all of them call it, with the same keys in the same order.

    Without it processes with another seed or batch would train, each its own model, and save a mixture of them.

    Raises:
      ConfigError: names every key whose value is not process 0's, the same in every process.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(f"{name}={value}".encode()).digest()[:8] for name, value in values.items()]
    gathered = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 8))
    differs = (gathered != gathered[:1]).any(axis=(0, 2))
    if differs.any():
        names = ", ".join(name for name, odd in zip(values, differs, strict=True) if odd)
        raise ConfigError(
            f"{names}: not the same in all processes; all words but distributed.* and data.cache_dir must be"
        )


def _early_number(arguments: Sequence[str]) -> int:
    """This process's number as far as words and environment tell it before anything is parsed."""
    if "distributed.initialize=false" in arguments:
        return 0
    for word in arguments:
        if re.fullmatch(r"distributed\.process_id=\d+", word):
            return int(word.partition("=")[2])
    try:
        cluster = find_cluster(os.environ, tpu=_has_tpu())
    except ConfigError:
        return 0
    return cluster.process_id or 0 if cluster is not None else 0


def _has_tpu() -> bool:
    """Importing JAX on a machine with TPUs sets this, unless JAX_PLATFORMS does."""
    return "tpu" in (jax.config.jax_platforms or "").split(",")


@contextlib.contextmanager
def _handler_kept(number: int) -> Iterator[None]:
    """Take a signal back from JAX, whose preemption service only notes it down: eval.py would never end."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, before)


def _within(seconds: float, action: Callable[[], None]) -> BaseException | None:
    """None where `action` ends in time, else its exception, or a TimeoutError while it goes on.

    In a thread of its own: the main thread of one that waits in C++ would see no signal.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError()
    return raised[0] if raised else None


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
