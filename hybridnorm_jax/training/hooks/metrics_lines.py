"""The lines of metrics.jsonl about steps."""

import jax
import numpy as np

from hybridnorm_jax.data.mixture import Mixture
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.run import Numbers, Run
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token
from hybridnorm_jax.training.time_metrics import TimeMetrics


class MetricsLines(Hook):
    """Writes a line for every `every`-th step, the last, and each that was skipped.

    A line has the step's own metrics, the speed, what loss_series.Series knows of the steps before it, and where the
    time went.
    """

    def __init__(self, *, every: int):
        self.every = every
        self._times: TimeMetrics | None = None

    def is_due(self, run: Run, step: int) -> bool:
        """In a step that was skipped too."""
        return super().is_due(run, step) or run.was_skipped(step)

    def start(self, run: Run) -> None:
        """Count the time from now on, and the tokens of a mixture until now: that can take half a second."""
        _read(run.mixture, run.first)
        here = [device for device in run.program.mesh.devices.flat if device.process_index == jax.process_index()]
        self._times = TimeMetrics(run.ledger, run.clock, here)

    def on_numbers(self, run: Run, numbers: Numbers) -> None:
        """Write a line."""
        values = {f"train/{name}": value for name, value in numbers.metrics.items()}
        values |= {"tokens_per_second": run.tokens_per_second, "mfu": _mfu(run)}
        values["time/step_seconds"] = np.round(run.clock.line, 6)
        values |= run.series.summary()
        values |= run.series.take()
        values |= self._times.line()
        values |= _read(run.mixture, numbers.step)
        run.writer.write(numbers.step, values)
        run.clock.begin_line()


def _read(mixture: Mixture | None, step: int) -> dict[str, float]:
    """What of each source of a mixture was trained on so far."""
    if mixture is None:
        return {}
    tokens = {f"data/{name}/tokens": count for name, count in mixture.tokens_until(step).items()}
    epochs = {f"data/{name}/epochs": round(amount.epochs, 6) for name, amount in mixture.read_until(step).items()}
    return tokens | epochs


def _mfu(run: Run) -> float | None:
    if run.tokens_per_second is None:
        return None
    mesh, config = run.program.mesh, run.config
    flops_per_token = model_flops_per_token(config.model, config.train.seq_len)
    return mfu(run.tokens_per_second, flops_per_token, mesh.devices.flat[0].device_kind, mesh.size)
