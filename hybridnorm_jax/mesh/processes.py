"""The processes of one run: how they find each other, who speaks, and how they end together.

JAX's runtime is started at most once, before any backend, and only where there are others to wait for. Where a start or
an end cannot succeed, JAX's C++ runtime aborts the process with a stack trace and status 134. So both are watched from
here and given up a moment earlier. cluster.py says what a launcher tells of the others, docs/clusters.md what a user
sees.
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
from hybridnorm_jax.mesh.cluster import DistributedSection, RuntimeArguments, find_cluster, runtime_arguments

# A process that fails waits this long for the others to fail alike, such as at a mesh that does not fit the devices.
ALIKE_SECONDS = 5
# After this long the coordinator ends those that did not. It is longer than ALIKE_SECONDS, so that the process that
# failed keeps its own exit status.
SHUTDOWN_SECONDS = 15
# A run that is told to stop gives its processes this long to close their files. If one of them was not told to stop,
# the others do not wait for it any longer.
STOPPED_SECONDS = 30
# JAX aborts at its own limit, so it is given a later one.
LATER_SECONDS = 60


class Processes:
    """This process among those of its run; one object for each command.

    Attributes:
      number: 0 where it is alone, and while nobody knows.
      count: how many there are, None before they have met.
    """

    def __init__(self, arguments: Sequence[str] = ()):
        self.number: int = _early_number(arguments)
        self.count: int | None = None
        self._runs = False  # JAX's runtime, started here
        self._alike = True  # whether all processes ended together, or this one has not started

    @contextlib.contextmanager
    def running(self, section: DistributedSection) -> Iterator[None]:
        """JAX's runtime, where there is more than this process; at the end they part together.

        Raises:
          ConfigError: see `runtime_arguments`.
          UserError: the others were not there in time.
        """
        arguments = runtime_arguments(section, os.environ, tpu=_has_tpu())
        if arguments is not None:
            self._start(section, arguments)
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

        Process 0 speaks for all. The others speak too of what may have happened on their host alone, such as an error
        of a file, and of an error that not all processes had.
        """
        if isinstance(error, UserError):
            may_be_alone = error.may_be_of_this_host_alone
        else:
            may_be_alone = isinstance(error, OSError | ImportError)
        return self.number == 0 or may_be_alone or not self._alike

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

    def _start(self, section: DistributedSection, arguments: RuntimeArguments) -> None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        self._runs = True
        self._alike = False
        chosen_devices = None
        if arguments.local_id is not None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            chosen_devices = [arguments.local_id]

        def initialize() -> None:
            jax.distributed.initialize(
                coordinator_address=arguments.coordinator,
                num_processes=arguments.num_processes,
                process_id=arguments.process_id,
                local_device_ids=chosen_devices,
                # Numbers that were given are not to be completed by a cluster's.
                cluster_detection_method=None if arguments.coordinator is None else "deactivate",
                initialization_timeout=section.timeout_seconds + LATER_SECONDS,
                heartbeat_timeout_seconds=section.heartbeat_seconds,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )

        with _handler_kept(signal.SIGTERM):
            failed = _within(section.timeout_seconds, initialize)
        if isinstance(failed, TimeoutError):
            raise _late_error(section, arguments)
        if failed is not None:
            raise _start_error(arguments, failed) from failed

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
        right = "every argument except distributed.* and data.cache_dir must be the same"
        raise ConfigError(f"{names}: not the same in all processes; {right}")


def _early_number(arguments: Sequence[str]) -> int:
    """This process's number, as far as arguments and environment tell it before anything is parsed; 0 otherwise."""
    if "distributed.initialize=false" in arguments:
        return 0
    numbers = _stated(arguments, "process_id")
    if numbers:  # one that has no others is alone, and is told so; a larger number is refused, by this process too
        return numbers[-1] if _stated(arguments, "num_processes") or "JAX_COORDINATOR_ADDRESS" in os.environ else 0
    try:
        cluster = find_cluster(os.environ, tpu=_has_tpu())
    except ConfigError:
        return 0
    if cluster is None or cluster.process_id is None:
        return 0
    return cluster.process_id


def _stated(arguments: Sequence[str], key: str) -> list[int]:
    """The values that arguments give distributed.KEY."""
    matches = [re.fullmatch(rf"distributed\.{key}=(\d{{1,6}})", argument) for argument in arguments]
    return [int(match[1]) for match in matches if match is not None]


def _late_error(section: DistributedSection, arguments: RuntimeArguments) -> UserError:
    """The others were not there in time."""
    limit = f"within {section.timeout_seconds} seconds (distributed.timeout_seconds)"
    who, where = _who(arguments), _where(arguments)
    if arguments.process_id == 0:
        return UserError(f"distributed: {who}, at {where}, was not joined by all others {limit}")
    right = "is process 0 running, is its port reachable, do all agree on their number?"
    return UserError(f"distributed: {who} did not meet the others at {where} {limit}: {right}")


def _start_error(arguments: RuntimeArguments, failed: BaseException) -> UserError:
    """JAX's runtime cannot start."""
    lines = str(failed).splitlines()
    reason = lines[0] if lines and lines[0] else type(failed).__name__
    right = "distributed.initialize=false trains on this process alone"
    return UserError(f"distributed: {_who(arguments)} cannot start at {_where(arguments)}: {reason}; {right}")


def _who(arguments: RuntimeArguments) -> str:
    if arguments.process_id is None:
        return "this process"
    return f"process {arguments.process_id} of {arguments.num_processes}"


def _where(arguments: RuntimeArguments) -> str:
    return "the coordinator" if arguments.coordinator is None else arguments.coordinator


def _has_tpu() -> bool:
    """Whether JAX will use TPUs. Importing JAX on a machine with TPUs sets its platforms, unless JAX_PLATFORMS does."""
    return "tpu" in (jax.config.jax_platforms or "").split(",")


@contextlib.contextmanager
def _handler_kept(number: int) -> Iterator[None]:
    """Take a signal back from JAX, whose preemption service only notes it down: `hybridnorm eval` would never end."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, before)


def _within(seconds: float, action: Callable[[], None]) -> BaseException | None:
    """None where `action` ends in time, else its exception, or a TimeoutError while it goes on.

    It runs in a thread of its own: while C++ waits in the main thread, that thread sees no signal.
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
    """End this process with this exit status, without waiting for anything."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
