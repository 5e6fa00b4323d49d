"""What is said of every step once its numbers are there: progress bar, metrics, skipped steps."""

import json
import math
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.goodput import StepClock, TimeLedger, TimeMetrics
from hybridnorm_jax.training.metrics import MetricsWriter
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.spikes import SpikeScore
from hybridnorm_jax.training.throughput import mfu, model_flops_per_token

# Words for the metrics that must be finite.
SKIPPED_FOR = {"loss": "loss", "gradient norm": "grad_norm"}
PERCENTILES = (50, 90, 99)
# A step's metric -> where those of all steps are.
SERIES = {"loss": "train/losses", "grad_norm": "train/grad_norms"}


class DivergedError(UserError):
    """train.max_bad_steps steps in a row were skipped; `step` is the last of them."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class StepLog:
    """Shows every step on the progress bar and writes every train.log_every-th, the last, and those skipped.

    Besides a step's own metrics a line has train/losses and train/grad_norms of all steps since they were written last,
    the percentiles train/grad_norm_p50, ... of these, and train/loss_spike_score and train/grad_norm_spike_score of the
    whole run (spikes.SpikeScore). What was watched in a step is a line of its own.

    Args:
      directory: of the run, whose metrics.jsonl has the steps that were made before.
    """

    def __init__(
        self,
        config: RunConfig,
        program: Program,
        directory: epath.Path,
        writer: MetricsWriter,
        ledger: TimeLedger,
        checkpoints: Checkpoints,
    ):
        self._config, self._device, self._devices = config, program.mesh.devices.flat[0], program.mesh.size
        self._writer, self._ledger, self._checkpoints = writer, ledger, checkpoints
        self._flops_per_token = model_flops_per_token(config.model, config.train.seq_len)
        self.clock = StepClock()
        here = [device for device in program.mesh.devices.flat if device.process_index == jax.process_index()]
        self._times = TimeMetrics(ledger, self.clock, here)
        self._series: dict[str, list[float]] = {name: [] for name in SERIES}
        self._spikes = {name: SpikeScore() for name in SERIES}
        # The file is mended by the process that writes it, and others may come before that.
        writes = jax.process_index() == 0
        for name, values in _past_series(directory / "metrics.jsonl").items() if writes else ():
            for value in values:
                self._spikes[name].add(value)

    def record(self, step: int, metrics: dict[str, Any], watched: dict[str, Any] | None, bar: tqdm) -> None:
        """Wait for the numbers of a step, and tell them.

        Raises:
          DivergedError: this was one skipped step in a row too many.
        """
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        seconds = self.clock.tick()
        bar.update(step - bar.n)
        rate = self.clock.rate()
        per_second = None if rate is None else rate * self._config.tokens_per_step
        speed = "" if rate is None else f", {per_second:,.0f} tokens/s"
        bar.set_postfix_str(f"loss {metrics['loss']:.4f}{speed}", refresh=False)
        for name, values in self._series.items():
            values.append(float(metrics[name]))
            self._spikes[name].add(values[-1])
        if watched is not None:
            layers = {f"watch/{name}": np.asarray(value) for name, value in watched.items()}
            self._writer.write(step, layers, by_layer=True)
        skipped = metrics["skipped_in_a_row"] > 0
        if skipped:
            self._ledger.move(seconds or 0.0, "steps", "skipped")
        if skipped or step % self._config.train.log_every == 0 or step == self._config.train.steps:
            self._write_line(step, metrics, per_second)
        if skipped:
            self._tell_skipped(step, metrics)

    def before_save(self, step: int) -> None:
        """Write the series up to a step that is saved: a run that goes on from there finds all of it."""
        if any(self._series.values()):
            self._writer.write(step, self._take_series())

    def _take_series(self) -> dict[str, np.ndarray]:
        taken = {SERIES[name]: np.array(values) for name, values in self._series.items()}
        self._series = {name: [] for name in SERIES}
        return taken

    def _write_line(self, step: int, metrics: dict[str, np.ndarray], per_second: float | None) -> None:
        values = {f"train/{name}": value for name, value in metrics.items()} | {"tokens_per_second": per_second}
        speed = None
        if per_second is not None:
            speed = mfu(per_second, self._flops_per_token, self._device.device_kind, self._devices)
        values["mfu"] = speed
        finite = [norm for norm in self._series["grad_norm"] if math.isfinite(norm)]
        for q in PERCENTILES:
            values[f"train/grad_norm_p{q}"] = float(np.percentile(finite, q)) if finite else None
        values |= {f"train/{name}_spike_score": spikes.score for name, spikes in self._spikes.items()}
        self._writer.write(step, values | self._take_series() | self._times.line())
        self.clock.begin_line()

    def _tell_skipped(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """A line for each skipped step; DivergedError after train.max_bad_steps of them in a row."""
        odd = [f"{name} is {metrics[key]}" for name, key in SKIPPED_FOR.items() if not math.isfinite(metrics[key])]
        reason = " and ".join(odd) or f"loss {metrics['loss']:.4f} is a spike"
        if jax.process_index() == 0:
            tqdm.write(f"step {step}: skipped, {reason}", file=sys.stderr)
        if metrics["skipped_in_a_row"] < self._config.train.max_bad_steps:
            return
        self._checkpoints.wait()
        newest = self._checkpoints.latest()
        good = "no checkpoint was saved" if newest is None else f"the last good checkpoint is that of step {newest}"
        limit = f"{metrics['skipped_in_a_row']} steps in a row were skipped (train.max_bad_steps)"
        raise DivergedError(step, f"step {step}: {reason}; {limit}; {good}, in {self._checkpoints.directory}")


def _past_series(file: epath.Path) -> dict[str, list[float]]:
    """The series in a metrics.jsonl that MetricsWriter has mended; null stands for what is not finite."""
    past: dict[str, list[float]] = {name: [] for name in SERIES}
    for line in file.read_text().splitlines() if file.exists() else ():
        record = json.loads(line)
        for name, key in SERIES.items():
            past[name] += [math.nan if value is None else value for value in record.get(key, ())]
    return past
