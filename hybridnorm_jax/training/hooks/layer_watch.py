"""Measures of every layer, now and then."""

from collections.abc import Callable

import numpy as np

from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.layer_measures import Measures
from hybridnorm_jax.training.run import Numbers, Run
from hybridnorm_jax.training.step import Batch


class LayerWatch(Hook):
    """Writes a line with the measures of every layer (layer_measures.py): of the first step and every `every`-th.

    Args:
      measure: (run, batch) -> the measures before a step, where others than the run's own program take them.
    """

    def __init__(self, *, every: int | None, measure: Callable[[Run, Batch], Measures] | None = None):
        self.every = every
        self._measure = _measured if measure is None else measure
        self._measures: dict[int, Measures] = {}  # by step, on the device
        self._compiled = False

    def is_due(self, run: Run, step: int) -> bool:
        """In the first step of the run too, but not in the last."""
        return self.every is not None and (step == 1 or step % self.every == 0)

    def before_update(self, run: Run, batch: Batch) -> None:
        """Give the measures to the device, for the state that the step begins with."""
        run.read_late()
        run.clock.leave_out(run.step + 1)
        with run.ledger.phase("steps" if self._compiled else "compilation"):
            self._measures[run.step + 1] = self._measure(run, batch)
        self._compiled = True

    def after_step(self, run: Run) -> None:
        """Wait for the measures: the time that they take is no training step's."""
        run.read_late()
        run.clock.restart()

    def on_numbers(self, run: Run, numbers: Numbers) -> None:
        """Write the measures once their step is done."""
        measures = self._measures.pop(numbers.step)
        layers = {f"watch/{name}": np.asarray(values) for name, values in measures.items()}
        run.writer.write(numbers.step, layers)


def _measured(run: Run, batch: Batch) -> Measures:
    return run.program.watch(run.state, batch)
