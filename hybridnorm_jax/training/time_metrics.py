"""The values of a line of metrics.jsonl that say where time and memory went."""

from collections.abc import Iterable

import jax

from hybridnorm_jax.training.step_clock import StepClock
from hybridnorm_jax.training.time_ledger import TimeLedger, goodput


class TimeMetrics:
    """The time/... values of a line of metrics.jsonl; docs/faults.md says what each means."""

    def __init__(self, ledger: TimeLedger, clock: StepClock, devices: Iterable[jax.Device]):
        self._ledger, self._clock, self._devices = ledger, clock, list(devices)
        self._seconds = ledger.seconds()  # at the line before

    def line(self) -> dict[str, float | None]:
        """Since the last line: step times, input wait, checkpoint blocking; since the beginning: goodput, totals."""
        before, now = self._seconds, self._ledger.seconds()
        self._seconds = now
        return {
            **self._clock.percentiles(),
            "time/input_wait": now["input"] - before["input"],
            "time/checkpoint_blocked": now["checkpoint"] - before["checkpoint"],
            "time/goodput": goodput(now),
            **{f"time/total_{phase.replace('-', '')}": seconds for phase, seconds in now.items()},
            **memory_in_use(self._devices),
        }


def memory_in_use(devices: Iterable[jax.Device]) -> dict[str, float | None]:
    """Bytes in use and their peak, of the fullest of this process's devices; None where the backend does not tell."""
    told = [stats for device in devices if (stats := device.memory_stats())]

    def largest(key: str) -> float | None:
        return max((float(stats[key]) for stats in told if key in stats), default=None)

    return {"time/hbm_in_use": largest("bytes_in_use"), "time/hbm_peak": largest("peak_bytes_in_use")}
