"""A thread that writes, so that a disk or a service that never answers cannot hold the training for ever."""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any


@dataclasses.dataclass
class _Job:
    """Something to do, since when it waits, since when it is done (None: not yet), and what becomes of it."""

    action: Callable[[], Any]
    given: float
    began: float | None = None
    outcome: futures.Future = dataclasses.field(default_factory=futures.Future)


class Courier:
    """Does what it is given in a thread, in order, and nothing more once something has failed.

    The thread is a daemon: one that hangs does not keep the process from ending.

    Args:
      seconds: how long anything may take, once all that was given before is done.
      wait_seconds: how long anything may wait for that; None: as `seconds`.
    """

    def __init__(self, name: str, *, seconds: float, wait_seconds: float | None = None):
        self._seconds = seconds
        self._wait_seconds = seconds if wait_seconds is None else wait_seconds
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._sent: collections.deque[_Job] = collections.deque()
        self._is_abandoned = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def send(self, action: Callable[[], Any]) -> None:
        """Have `action` done, and do not wait for it.

        Raises:
          TimeoutError: something that was sent before takes too long.
          Exception: that of something that was sent before.
        """
        self._collect()
        self._sent.append(self._give(action))

    def call(self, action: Callable[[], Any]) -> Any:
        """What `action` returns or raises; TimeoutError if it takes too long."""
        return self._wait(self._give(action))

    def finish(self, *, within: float) -> None:
        """Wait for all that was sent, and no longer than `within` seconds; raises as `send` does."""
        until = time.monotonic() + within
        while self._sent:
            self._wait(self._sent.popleft(), until=until)

    def close(self) -> None:
        """Let the thread end once nothing is left to do; does not wait."""
        self._queue.put(None)

    def abandon(self) -> None:
        """Let the thread end, if it ever does, once it has done what it is doing."""
        self._is_abandoned = True
        self._queue.put(None)

    def _give(self, action: Callable[[], Any]) -> _Job:
        job = _Job(action, time.monotonic())
        self._queue.put(job)
        return job

    def _collect(self) -> None:
        while self._sent and (self._sent[0].outcome.done() or self._left(self._sent[0]) <= 0):
            self._wait(self._sent.popleft())

    def _left(self, job: _Job) -> float:
        """For how many seconds the job may go on, or wait."""
        until = job.given + self._wait_seconds if job.began is None else job.began + self._seconds
        return until - time.monotonic()

    def _wait(self, job: _Job, *, until: float | None = None) -> Any:
        """What becomes of the job; TimeoutError where it takes too long, or is not done at the time `until`."""
        while not job.outcome.done():
            left = self._left(job)
            if until is not None:
                left = min(left, until - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"no answer within {self._seconds:g} seconds")
            # The job may begin meanwhile, and then has other limits.
            futures.wait([job.outcome], timeout=left)
        return job.outcome.result()

    def _work(self) -> None:
        failed: BaseException | None = None
        while (job := self._queue.get()) is not None and not self._is_abandoned:
            if failed is not None:
                job.outcome.set_exception(failed)
                continue
            job.began = time.monotonic()
            try:
                job.outcome.set_result(job.action())
            except BaseException as error:
                failed = error
                job.outcome.set_exception(error)


class DispensableCourier:
    """A Courier for what a run can do without: its first failure is told, and nothing is done after it.

    Args:
      name, seconds, wait_seconds: as those of Courier.
      failed: is told the first failure.
    """

    def __init__(
        self, name: str, *, seconds: float, failed: Callable[[Exception], None], wait_seconds: float | None = None
    ):
        self._courier: Courier | None = Courier(name, seconds=seconds, wait_seconds=wait_seconds)
        self._failed = failed

    def send(self, action: Callable[[], Any]) -> None:
        """As Courier.send."""
        self._attempt(lambda courier: courier.send(action))

    def finish(self, *, within: float) -> None:
        """As Courier.finish."""
        self._attempt(lambda courier: courier.finish(within=within))

    def close(self) -> None:
        """As Courier.close."""
        self._attempt(lambda courier: courier.close())

    def _attempt(self, action: Callable[[Courier], None]) -> None:
        if self._courier is None:
            return
        try:
            action(self._courier)
        except Exception as error:
            self._courier.abandon()
            self._courier = None
            self._failed(error)
