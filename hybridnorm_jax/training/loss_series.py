"""The losses and gradient norms of all steps, for metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from hybridnorm_jax.training.metrics_file import Record
from hybridnorm_jax.training.spikes import SpikeScore

# A metric of a step -> the key in metrics.jsonl under which the values of all steps are.
SERIES = {"loss": "train/losses", "grad_norm": "train/grad_norms"}
PERCENTS = (50, 90, 99)


class Series:
    """What a line of metrics.jsonl has of every step, also of the steps that have no line of their own.

    These are train/losses and train/grad_norms since they were last written, the percentiles train/grad_norm_p50, ...
    of these, and train/loss_spike_score and train/grad_norm_spike_score of the whole run (spikes.SpikeScore).
    """

    def __init__(self):
        self._unwritten: dict[str, list[float]] = {name: [] for name in SERIES}
        self._spikes = {name: SpikeScore() for name in SERIES}

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Add the metrics of one more step."""
        for name, values in self._unwritten.items():
            values.append(float(metrics[name]))
            self._spikes[name].add(values[-1])

    def add_written(self, records: Iterable[Record]) -> None:
        """Count the steps that metrics.jsonl has towards the spike scores."""
        for record in records:
            for name, key in SERIES.items():
                for value in record.get(key, ()):
                    self._spikes[name].add(math.nan if value is None else value)  # null: not finite

    def summary(self) -> dict[str, float | None]:
        """Percentiles of the gradient norms that are not written yet, and the spike scores."""
        finite = [norm for norm in self._unwritten["grad_norm"] if math.isfinite(norm)]
        percentiles = {
            f"train/grad_norm_p{percent}": float(np.percentile(finite, percent)) if finite else None
            for percent in PERCENTS
        }
        return percentiles | {f"train/{name}_spike_score": spikes.score for name, spikes in self._spikes.items()}

    def take(self) -> dict[str, np.ndarray]:
        """The values since they were last taken, by their keys in metrics.jsonl; empty where there are none."""
        if not any(self._unwritten.values()):
            return {}
        taken = {SERIES[name]: np.array(values) for name, values in self._unwritten.items()}
        self._unwritten = {name: [] for name in SERIES}
        return taken
