"""Where the time of a run goes: seconds by phase, the times of single steps, memory in use."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

# "skipped" is the time of steps that were computed and not made; "other" is profiling and what has no name.
PHASES = ("start-up", "compilation", "steps", "input", "checkpoint", "evaluation", "skipped", "other")


class TimeLedger:
    """Seconds by phase since the process began. Exactly one phase goes on at any time.

    Args:
      began: time.perf_counter() at the beginning; None: now.
      now: the clock.

    Attributes:
      current: (phase that goes on, when it was entered), read by the watchdog from its own thread.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._began = now() if began is None else began
        self._ended = dict.fromkeys(PHASES, 0.0)
        self.current = ("start-up", self._began)

    def enter(self, phase: str) -> float:
        """Begin a phase, maybe the same once more; returns the seconds of the one that ended."""
        now = self._now()
        before, since = self.current
        self._ended[before] += now - since
        self.current = (phase, now)
        return now - since

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this context one phase, after it the one before."""
        before, _ = self.current
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
        phase, since = self.current
        return self._ended | {phase: self._ended[phase] + self._now() - since}

    def goodput(self) -> float:
        """Seconds in steps that were made / all seconds."""
        return _goodput(self.seconds())

    def table(self) -> str:
        """Seconds and shares by phase, one line each; phases without any are left out."""
        seconds = self.seconds()
        total = sum(seconds.values())
        lines = [f"Time of this process: {total:,.1f} s, goodput {100 * seconds['steps'] / total:.1f} %"]
        lines += [
            f"{name:<12} {spent:12,.1f} s {100 * spent / total:6.1f} %" for name, spent in seconds.items() if spent
        ]
        return "\n".join(lines)


def _goodput(seconds: dict[str, float]) -> float:
    return seconds["steps"] / sum(seconds.values())


class StepClock:
    """Seconds from one step's result to the next one's, between two lines of metrics."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._last: float | None = None
        self.seconds: list[float] = []

    def tick(self) -> float | None:
        """A step's result has been seen: the seconds since the one before, None for the first and after a pause."""
        last, self._last = self._last, self._now()
        if last is None:
            return None
        self.seconds.append(self._last - last)
        return self.seconds[-1]

    def pause(self) -> None:
        """Something else was done: the time up to the next result is no step's."""
        self._last = None

    def begin_line(self) -> None:
        """Forget the seconds, not the last result: no time is lost between lines."""
        self.seconds = []

    def rate(self) -> float | None:
        """Steps per second; None before two results were seen."""
        return len(self.seconds) / sum(self.seconds) if self.seconds else None

    def percentiles(self) -> dict[str, float | None]:
        """Median, 90th percentile and largest of the seconds."""
        names = {"time/step_p50": 50, "time/step_p90": 90, "time/step_max": 100}
        return {name: float(np.percentile(self.seconds, q)) if self.seconds else None for name, q in names.items()}


class TimeMetrics:
    """The time/... values of a line of metrics.jsonl; docs/faults.md says what each means."""

    def __init__(self, ledger: TimeLedger, clock: StepClock, devices: Iterable[jax.Device]):
        self._ledger, self._clock, self._devices = ledger, clock, list(devices)
        self._before = ledger.seconds()

    def line(self) -> dict[str, float | None]:
        """Since the last line: step times, input wait, checkpoint blocking; since the beginning: goodput, totals."""
        before, self._before = self._before, self._ledger.seconds()
        totals = {f"time/total_{name.replace('-', '')}": seconds for name, seconds in self._before.items()}
        return {
            **self._clock.percentiles(),
            "time/input_wait": self._before["input"] - before["input"],
            "time/checkpoint_blocked": self._before["checkpoint"] - before["checkpoint"],
            "time/goodput": _goodput(self._before),
            **totals,
            **memory(self._devices),
        }


def memory(devices: Iterable[jax.Device]) -> dict[str, float | None]:
    """Bytes in use and their peak, of the fullest of this process's devices; None where the backend does not tell."""
    stats = [stats for device in devices if (stats := device.memory_stats())]
    names = {"time/hbm_in_use": "bytes_in_use", "time/hbm_peak": "peak_bytes_in_use"}
    return {name: max((float(s[key]) for s in stats if key in s), default=None) for name, key in names.items()}


def process_began() -> float:
    """When this process began, as time.perf_counter() counts; now, where the system does not tell (not Linux)."""
    now = time.perf_counter()
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            return now - max(0.0, float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return now
