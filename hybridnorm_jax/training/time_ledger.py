"""Where the time of a run goes: seconds by phase."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from hybridnorm_jax.streams import duration

# "skipped" is the time of steps that were computed and not made; "other" is profiling and what has no name.
PHASES = ("start-up", "compilation", "steps", "input", "checkpoint", "evaluation", "skipped", "other")

SHOWN_SECONDS = 0.05


class Phase(NamedTuple):
    """The phase that goes on, and when it was entered."""

    name: str
    since: float


class TimeLedger:
    """Seconds by phase since the process began. Exactly one phase goes on at any time.

    Args:
      began: time.perf_counter() at the beginning; None: now.
      now: the clock.

    Attributes:
      current: the phase that goes on, read by the watchdog from its own thread.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._began = now() if began is None else began
        self._ended = dict.fromkeys(PHASES, 0.0)
        self.current = Phase("start-up", self._began)

    def enter(self, phase: str) -> float:
        """Begin a phase, maybe the same once more; returns the seconds of the one that ended."""
        ended, now = self.current, self._now()
        self._ended[ended.name] += now - ended.since
        self.current = Phase(phase, now)
        return now - ended.since

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this context one phase, after it the one before."""
        before = self.current.name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Book seconds elsewhere, once it is known what they were."""
        self._ended[source] -= seconds
        self._ended[target] += seconds

    def seconds(self) -> dict[str, float]:
        """By phase, with what goes on up to now; they add up to the time since the beginning."""
        current = self.current
        return self._ended | {current.name: self._ended[current.name] + self._now() - current.since}

    def goodput(self) -> float:
        """Seconds in steps that were made / all seconds."""
        return goodput(self.seconds())

    def table(self) -> str:
        """Seconds and shares by phase, one line each; phases that round to 0.0 s are left out."""
        seconds = self.seconds()
        total = sum(seconds.values())
        share = 100 * seconds["steps"] / total
        lines = [f"Time of this process: {duration(total)}, of which {share:.1f} % in training steps (goodput)"]
        lines += [
            f"  {name:<12} {spent:10,.1f} s {100 * spent / total:6.1f} %"
            for name, spent in seconds.items()
            if spent >= SHOWN_SECONDS
        ]
        return "\n".join(lines)


def goodput(seconds: Mapping[str, float]) -> float:
    """Seconds in steps that were made / all seconds, of seconds by phase."""
    return seconds["steps"] / sum(seconds.values())


def process_began() -> float:
    """When this process began, as time.perf_counter() counts; now, where the system does not tell (not Linux)."""
    now = time.perf_counter()
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return now - max(0.0, float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return now
