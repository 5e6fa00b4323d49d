"""A thread that writes, so that a disk or a service that never answers cannot hold the training for ever."""

import collections
import queue
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple


class _Job(NamedTuple):
    """Something to do, since when it waits, and what becomes of it."""

    action: Callable[[], Any]
    since: float
    outcome: futures.Future


class Courier:
    """Does what it is given in a thread, in order, and nothing more once something has failed.

    The thread is a daemon: one that hangs does not keep the process from ending.

    Args:
      seconds: how long anything may take, from the moment that it is given.
    """

    def __init__(self, name: str, *, seconds: float):
        self._seconds = seconds
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._sent: collections.deque[_Job] = collections.deque()
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

    def finish(self) -> None:
        """Wait for all that was sent, no longer than the last of it may take; raises as `send` does."""
        while self._sent:
            self._wait(self._sent.popleft())

    def close(self) -> None:
        """Let the thread end once nothing is left to do; does not wait."""
        self._queue.put(None)

    def _give(self, action: Callable[[], Any]) -> _Job:
        job = _Job(action, time.monotonic(), futures.Future())
        self._queue.put(job)
        return job

    def _collect(self) -> None:
        while self._sent and (self._sent[0].outcome.done() or self._left(self._sent[0]) <= 0):
            self._wait(self._sent.popleft())

    def _left(self, job: _Job) -> float:
        return job.since + self._seconds - time.monotonic()

    def _wait(self, job: _Job) -> Any:
        try:
            return job.outcome.result(max(self._left(job), 0))
        except futures.TimeoutError:
            if job.outcome.done():
                raise
            raise TimeoutError(f"no answer within {self._seconds:g} seconds") from None

    def _work(self) -> None:
        failed: BaseException | None = None
        while (job := self._queue.get()) is not None:
            if failed is not None:
                job.outcome.set_exception(failed)
                continue
            try:
                job.outcome.set_result(job.action())
            except BaseException as error:
                failed = error
                job.outcome.set_exception(error)
