"""How long a comparison will take on the devices at hand, from a few measured steps of each scheme."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hybridnorm_jax.data import Data, Rows, open_data
from hybridnorm_jax.data.pipeline import validation_batches
from hybridnorm_jax.lab.compare import with_budget
from hybridnorm_jax.lab.compare_options import Comparison, Contestant, run_config
from hybridnorm_jax.lab.run_results import hardware
from hybridnorm_jax.lab.sweep import MOST_EXTENSIONS
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.streams import duration
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.resume import training_batches
from hybridnorm_jax.training.shared_programs import SharedPrograms

# Measured calls of each program, after the one that compiles it; the median counts.
MEASURED = 5


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the runs of one contestant will take, in seconds.

    Attributes:
      name: of the contestant.
      runs: how many.
      steps: of each.
      step: one training step.
      evaluation: one evaluation of all validation sets.
      watch: one measurement of the layers.
      evaluations, watches: of each run.
      compilation: of all programs, once for all runs.
    """

    name: str
    runs: int
    steps: int
    step: float
    evaluation: float
    watch: float
    evaluations: int
    watches: int
    compilation: float

    @property
    def total(self) -> float:
        """Seconds of all runs, without starting them and saving."""
        of_run = self.steps * self.step + self.evaluations * self.evaluation + self.watches * self.watch
        return self.runs * of_run + self.compilation


def expected(asked: Comparison) -> list[Expected]:
    """Measure each contestant.

    Raises:
      UserError: as `hybridnorm lab compare`, for what is wrong before anything is trained.
    """
    asked = with_budget(asked)
    first = asked.configs[0]
    data = open_data(first.data, seq_len=first.train.seq_len, vocab_size=first.model.vocab_size)
    programs = SharedPrograms()
    found = []
    for contestant in asked.contestants:
        say(f"measuring {contestant.name}")
        found.append(_measured(asked, contestant, data, programs))
    return found


def table(asked: Comparison, measured: list[Expected]) -> str:
    """The measured times as lines, with their sum."""
    width = max(20, *(len(each.name) + 2 for each in measured))
    heads = f"{'runs':>6}{'steps':>9}{'s / step':>10}{'s / eval':>10}{'compiling':>12}{'in all':>14}"
    lines = [f"{'scheme':{width}}{heads}"]
    for each in measured:
        times = f"{each.step:>10.3f}{each.evaluation:>10.2f}{duration(each.compilation):>12}{duration(each.total):>14}"
        lines.append(f"{each.name:{width}}{each.runs:>6}{each.steps:>9,}{times}")
    lines.append(f"\nIn all {duration(sum(each.total for each in measured))} on {hardware()}, as busy as they are now.")
    compiling = sum(each.compilation for each in measured) / sum(each.total for each in measured)
    lines.append(f"Of that {100 * compiling:.0f} % is compilation, less where programs are kept from before.")
    if asked.options.together > 1:
        lines.append(f"This is for one run at a time; what together={asked.options.together} saves was not measured.")
    if asked.options.sweep:
        lines.append(
            f"A sweep whose best rate lies at the edge of its grid takes up to {MOST_EXTENSIONS} rates more for that "
            "scheme."
        )
    return "\n".join(lines)


def _measured(asked: Comparison, contestant: Contestant, data: Data, programs: SharedPrograms) -> Expected:
    rates, seeds = asked.rates(contestant), asked.options.seeds
    config = run_config(contestant, asked.directory, rate=rates[0], seed=seeds[0])
    program = programs.program(config)
    programs.keep(program)
    train = config.train
    state = program.fresh_state()
    batch = next(training_batches(config, program, data))
    watch_seconds = compiling = 0.0
    if train.watch_every is not None:
        watch_seconds, compiling = _timed(lambda: program.watch(state, batch))
    evaluation_seconds = compiling_evaluation = 0.0
    sets = [_scored(windows, config.eval.stride) for windows in data.validation.values()]
    if sets:
        held = next(validation_batches(sets[0], batch_size=program.eval_batch_size, share=program.share))
        of_batch, compiling_evaluation = _timed(lambda: program.eval_step(state.params, held, step=state.step))
        evaluation_seconds = of_batch * sum(_batches(program, len(windows)) for windows in sets)

    def step() -> Any:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        return metrics

    step_seconds, compiling_step = _timed(step)
    swept = (len(rates) + 2) * len(asked.options.sweep_seeds)
    return Expected(
        name=contestant.name,
        runs=swept + len(seeds) if asked.options.sweep else len(rates) * len(seeds),
        steps=train.steps,
        step=step_seconds,
        evaluation=evaluation_seconds,
        watch=watch_seconds,
        evaluations=math.ceil(train.steps / config.eval.every),
        watches=0 if train.watch_every is None else 1 + train.steps // train.watch_every,
        compilation=compiling + compiling_evaluation + compiling_step,
    )


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """The median seconds of a call, and how much longer the first one took, which compiles."""
    seconds = []
    for _ in range(1 + MEASURED):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    median = float(np.median(seconds[1:]))
    return median, max(0.0, seconds[0] - median)


def _scored(windows: Rows, stride: int | None) -> Rows:
    """The sequences of a validation set."""
    return windows if stride is None else windows.with_stride(stride)


def _batches(program: Program, sequences: int) -> int:
    """Batches of one validation set with so many sequences."""
    scored = sequences if program.eval_sequences is None else min(sequences, program.eval_sequences)
    return math.ceil(scored / program.eval_batch_size)
