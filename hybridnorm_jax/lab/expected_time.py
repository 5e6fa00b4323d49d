"""How long a comparison will take on the devices at hand, from a few measured steps of each scheme."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import Data, open_data
from hybridnorm_jax.lab.compare import with_budget
from hybridnorm_jax.lab.compare_options import Comparison, Contestant, run_config
from hybridnorm_jax.lab.run_results import hardware
from hybridnorm_jax.lab.sweep import MOST_EXTENSIONS
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.streams import duration
from hybridnorm_jax.training.program import Program
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
    train, evaluation = config.train, config.eval
    sets = data.validation.values()
    batches = sum(_batches(program, len(windows), evaluation.stride, train.seq_len) for windows in sets)
    state = program.fresh_state()
    batch = _batch(config, program, (train.grad_accumulation, config.microbatch_size))
    watch_seconds = compiling = 0.0
    if train.watch_every is not None:
        watch_seconds, compiling = _timed(lambda: program.watch(state, batch))
    held = _batch(config, program, (program.eval_batch_size,))
    eval_seconds, compiling_eval = _timed(lambda: program.eval_step(state.params, held, step=state.step))

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
        evaluation=batches * eval_seconds,
        watch=watch_seconds,
        evaluations=math.ceil(train.steps / evaluation.every),
        watches=0 if train.watch_every is None else 1 + train.steps // train.watch_every,
        compilation=compiling + compiling_eval + compiling_step,
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


def _batch(config: RunConfig, program: Program, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random tokens, as this process reads them: (..., sequences, positions)."""
    *leading, sequences = shape
    shape = (*leading, sequences // program.share.count, config.train.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
    if config.data.segment_ids:
        positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        batch |= {"segment_ids": np.zeros(shape, np.int32), "positions": positions}
    return batch


def _batches(program: Program, windows: int, stride: int | None, seq_len: int) -> int:
    """Batches of one validation set with so many windows that do not overlap."""
    sequences = windows if stride is None else windows * seq_len // stride
    if program.eval_sequences is not None:
        sequences = min(sequences, program.eval_sequences)
    return math.ceil(sequences / program.eval_batch_size)
