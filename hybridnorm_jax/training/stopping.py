"""What ends a run early, saved: SIGTERM, SIGINT, SIGHUP, and the preemption notice of JAX's coordination service.

What a scheduler sees is in docs/faults.md.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridnorm_jax.errors import EXIT_CODES, REQUEUE, RunStopped


class StopSignals:
    """A context in which a first SIGTERM, SIGINT or SIGHUP is a request that `poll` sees; a second ends at once.

    Python runs handlers in its main thread; in any other this changes no handler, and only JAX's notice is seen.
    """

    def __init__(self):
        self._received = 0  # an exit code
        self._interruptible = False
        self._polls = 0
        self._exchange: _Exchange | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self.install()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Set the handlers; again where something else may have (jax.distributed.initialize sets one for SIGTERM)."""
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue  # as a shell script has it for SIGINT of what it starts with &
                before = signal.signal(number, self._receive)
                # None: set by C code, which Python cannot put back.
                self._before.setdefault(number, signal.SIG_DFL if before is None else before)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where nothing is there to be saved: a signal raises RunStopped at once, without asking other processes."""
        self._interruptible = True
        try:
            self._raise_if_received()
            yield
        finally:
            self._interruptible = False

    def poll(self) -> None:
        """Raise RunStopped if any process was told to stop: in all processes at the same call, or in none.

        All processes call this equally often. With several it never waits for the device, and a process sees what was
        told to another before the *previous* call (before this one at the first).
        """
        self._polls += 1
        code = self._received or (REQUEUE if _preemption_notice(self._polls) else 0)
        if jax.process_count() > 1:
            self._exchange = self._exchange or _Exchange()
            code = self._exchange.swap(code)
        if code:
            raise RunStopped(code, "nothing was to be saved")

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = EXIT_CODES[signal.Signals(number)]
        # Not print: the signal may have come while another print held the buffer.
        with contextlib.suppress(OSError):  # standard error may have gone with the terminal
            os.write(2, f"\n{signal.Signals(number).name}: stopping; a second one ends at once\n".encode())
        if self._interruptible:
            self._raise_if_received()

    def _raise_if_received(self) -> None:
        if self._received:
            raise RunStopped(self._received, "no step was made, nothing was to be saved")


class _Exchange:
    """The largest of the numbers of all processes, one call late: the host never waits for the step that is running.

    The first call returns its own.
    """

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("all",))
        self._split = NamedSharding(mesh, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._sent: jax.Array | None = None

    def swap(self, number: int) -> int:
        mine = np.full(1, number, np.int32)
        numbers = jax.make_array_from_callback((self._split.mesh.size,), self._split, lambda _: mine)
        before = self._sent
        self._sent = self._largest(numbers)
        return int(self._sent if before is None else before)


def _preemption_notice(number: int) -> bool:
    """Whether JAX's coordination service, where one runs, was told of a preemption; `number` grows by call."""
    if not jax.distributed.is_initialized() or not jax.config.jax_enable_preemption_service:
        return False
    return multihost_utils.reached_preemption_sync_point(number)
