"""A run that is going on: everything that the training loop and its hooks share."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import Data
from hybridnorm_jax.data.mixture import Mixture, mixture_of
from hybridnorm_jax.evaluation.perplexity import Score
from hybridnorm_jax.evaluation.tasks import TaskScore
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.local_checkpoints import LocalCheckpoints
from hybridnorm_jax.training.loss_series import Series
from hybridnorm_jax.training.metrics_writer import MetricsWriter
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run_lock import RunLock
from hybridnorm_jax.training.state import TrainState
from hybridnorm_jax.training.step_clock import StepClock
from hybridnorm_jax.training.stopping import StopSignals
from hybridnorm_jax.training.task_model import TaskModel
from hybridnorm_jax.training.throughput import tokens_per_second
from hybridnorm_jax.training.time_ledger import TimeLedger
from hybridnorm_jax.training.trained_before import Trained


class LateMetrics(NamedTuple):
    """The metrics of a step that the device may still be busy with."""

    step: int
    metrics: dict[str, jax.Array]

    @property
    def are_ready(self) -> bool:
        """Whether the device has finished the step."""
        return bool(self.metrics["loss"].is_ready())  # type: ignore[attr-defined]  # JAX has it, its stubs do not


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The metrics of a step that the device has finished.

    Attributes:
      step: which it is, counted from 1.
      metrics: see step.make_train_step.
    """

    step: int
    metrics: dict[str, np.ndarray]

    @property
    def skipped(self) -> bool:
        """Whether the step was computed and not made (anomalies.judge)."""
        return bool(self.metrics["skipped_in_a_row"] > 0)


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run between its first and its last step. The loop and the hooks have one object of this class.

    Set before the first step:
      config, program, data: what is trained, compiled for the devices, and on what.
      directory: of the run; `lock` keeps other runs out of it.
      checkpoints, writer: where states and metrics go.
      local: where states go on the hosts' own disks; None: nowhere.
      signals: whether the run is told to stop.
      ledger: where the time goes.
      hooks: what happens besides the steps, in the order in which it happens.
      first: how many steps were made before this process; 0 for a new run.
      files: the identities of the files that it trains on, as run_identity.data_files gives them.
      trained_before: what other runs trained the parameters on that it began with.
      task_model: scores eval.tasks; None: there are none.
      together: how many runs a step trains at once (lab/together.py).

    Changed by every step:
      step: how many steps were made. While a hook's before_step and before_update run, the step to come is step + 1.
      state: after that many steps. Its arrays are gone once the next step is made, which takes their memory.
      iterator: its next batch is that of the step to come.
      late: metrics that were not read yet; None: all were.
      numbers: what was read last; None: nothing.
      clock: the times of single steps. A hook that does other work in a step tells it so (hook.py).
      series: losses and gradient norms of all steps.
      scores: of the newest evaluation, by validation set; None: there was none.
      plain_scores: with eval.plain, as `scores`, of the parameters that are not averaged.
      task_scores: the same of eval.tasks.
    """

    config: RunConfig
    program: Program
    data: Data
    directory: epath.Path
    lock: RunLock
    checkpoints: Checkpoints
    writer: MetricsWriter
    signals: StopSignals
    ledger: TimeLedger
    hooks: Sequence[Hook]
    first: int
    state: TrainState
    iterator: Any
    files: Sequence[dict[str, Any]] = ()
    trained_before: Sequence[Trained] = ()
    task_model: TaskModel | None = None
    local: LocalCheckpoints | None = None
    together: int = 1
    step: int = dataclasses.field(init=False)
    late: LateMetrics | None = None
    numbers: Numbers | None = None
    clock: StepClock = dataclasses.field(default_factory=StepClock)
    series: Series = dataclasses.field(default_factory=Series)
    scores: dict[str, Score] | None = None
    plain_scores: dict[str, Score] = dataclasses.field(default_factory=dict)
    task_scores: dict[str, TaskScore] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step = self.first
        self._is_reading = False

    @functools.cached_property
    def mixture(self) -> Mixture | None:
        """How its sources are mixed; None: it reads one."""
        return mixture_of(self.config, self.data)

    @property
    def steps(self) -> int:
        """How many steps the whole run has."""
        return self.config.train.steps

    @property
    def named(self) -> str:
        """What lines about this run begin with, where several are trained at once."""
        return "" if self.together == 1 else f"{self.config.run.name}: "

    @property
    def tokens_per_second(self) -> float | None:
        """Since the last line of metrics (throughput.tokens_per_second); None where no step only trained."""
        return tokens_per_second(self.clock.line, self.config.tokens_per_step)

    def due(self, step: int) -> list[Hook]:
        """The hooks that are due in a step, in order."""
        return [hook for hook in self.hooks if hook.is_due(self, step)]

    def was_skipped(self, step: int) -> bool:
        """Whether the numbers of this step were the last that were read, and it was skipped."""
        return self.skipped_in_a_row(step) > 0

    def skipped_in_a_row(self, step: int) -> int:
        """How many steps up to this one were skipped, if its numbers were the last that were read; otherwise 0."""
        if self.numbers is None or self.numbers.step != step:
            return 0
        return int(self.numbers.metrics["skipped_in_a_row"])

    def exchange_late(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read the metrics of the step before, if they were not read yet, and keep those of this one for later.

        So the host reads them while the device is busy with this step.
        """
        before = self.late
        self.late = LateMetrics(step, metrics)
        self._read(before)

    def read_late(self) -> None:
        """Wait for the metrics that were not read yet, if there are any, and give them to the hooks.

        Raises:
          RuntimeError: a hook calls it in on_numbers, where hooks after it still wait for the numbers of a step before.
        """
        if self._is_reading:
            raise RuntimeError("run.read_late() in on_numbers: later hooks would get the numbers out of order")
        late = self.late
        self.late = None
        self._read(late, at_once=True)

    def _read(self, late: LateMetrics | None, *, at_once: bool = False) -> None:
        """Wait for the metrics of a step, and give them to the hooks that are due in it.

        Args:
          late: None: there are none.
          at_once: whether the next batch was not waited for yet.
        """
        if late is None:
            return
        numbers = Numbers(late.step, {name: np.asarray(value) for name, value in late.metrics.items()})
        seconds = self.clock.tick(numbers.step, was_skipped=numbers.skipped, at_once=at_once)
        self.numbers = numbers
        self.series.add(numbers.metrics)
        if numbers.skipped and seconds is not None:
            self.ledger.move(seconds / self.together, source="steps", target="skipped")
        self._is_reading = True
        try:
            for hook in self.due(numbers.step):
                hook.on_numbers(self, numbers)
        finally:
            self._is_reading = False
