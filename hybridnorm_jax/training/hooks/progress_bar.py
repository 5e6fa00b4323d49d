"""How far a run is, on standard error: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

import jax
from tqdm import tqdm

from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.streams import can_redraw, duration
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.run import Numbers, Run
from hybridnorm_jax.training.throughput import tokens_per_second

SECONDS_ON_TERMINAL, SECONDS_IN_FILE = 0.2, 30.0
# So many of the newest steps that only trained are shown the median of.
NEWEST = 100


class _Shown(Protocol):
    """What shows how far the run is."""

    def update(self, step: int, what: str) -> None:
        """One more step was made; `what` says how it went."""

    def close(self) -> None:
        """Nothing more is shown."""


class ProgressBar(Hook):
    """Shows how many steps were made, the newest loss and the tokens per second, on process 0."""

    def __init__(self):
        self._shown: _Shown | None = None

    def start(self, run: Run) -> None:
        """Show the first step, or the step that the run goes on from."""
        if jax.process_index() == 0:
            self._shown = _Bar(run) if can_redraw(sys.stderr) else ProgressLines(run.steps, run.first)

    def on_numbers(self, run: Run, numbers: Numbers) -> None:
        """Show one more step."""
        if self._shown is not None:
            rate = tokens_per_second(run.clock.process[-NEWEST:], run.config.tokens_per_step)
            speed = "" if rate is None else f", {rate:,.0f} tokens/s"
            self._shown.update(numbers.step, f"loss {numbers.metrics['loss']:.4f}{speed}")

    def close(self) -> None:
        """Leave what is shown as it is, and go to the next line."""
        if self._shown is not None:
            self._shown.close()


class _Bar:
    """A bar that is drawn again and again in the same line."""

    def __init__(self, run: Run):
        self._bar = tqdm(
            total=run.steps,
            initial=run.first,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
            dynamic_ncols=True,
            mininterval=SECONDS_ON_TERMINAL,
        )

    def update(self, step: int, what: str) -> None:
        """Draw it, unless that was done a moment ago."""
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Draw the last step, and go to the next line."""
        if not self._bar.disable:
            self._bar.refresh()
        self._bar.close()


class ProgressLines:
    """A line every half minute, and one for the first step and the last.

    Args:
      steps: of the whole run.
      first: how many were made before.
      now: the clock, in seconds.
    """

    def __init__(self, steps: int, first: int, now: Callable[[], float] = time.monotonic):
        self._steps, self._now = steps, now
        # The first step compiles: how fast the others are says only the time after it.
        self._counted_from: tuple[int, float] | None = None
        self._said_at: float | None = None
        self._newest = (first, "")
        self._said = first

    def update(self, step: int, what: str) -> None:
        """Say it, unless that was done less than half a minute ago."""
        now = self._now()
        self._newest = (step, what)
        if self._counted_from is None:
            self._counted_from = (step, now)
        if self._said_at is None or now - self._said_at >= SECONDS_IN_FILE or step == self._steps:
            self._say(step, f"{what}{self._left(step, now)}")
            self._said_at = now

    def close(self) -> None:
        """Say the newest step of a run that was stopped."""
        step, what = self._newest
        if step != self._said:
            self._say(step, what)

    def _say(self, step: int, what: str) -> None:
        say(f"step {step}/{self._steps}: {what}", file=sys.stderr)
        self._said = step

    def _left(self, step: int, now: float) -> str:
        counted_from, began = self._counted_from
        made = step - counted_from
        if not made or step == self._steps:
            return ""
        return f", {duration((now - began) / made * (self._steps - step))} left"


def say_above_bar(text: str, *, file: TextIO | None = None) -> None:
    """Print a line on process 0 without tearing the progress bar; `file` is standard output by default."""
    if jax.process_index() == 0:
        with tqdm.external_write_mode(file=file):
            say(text, file=file)
