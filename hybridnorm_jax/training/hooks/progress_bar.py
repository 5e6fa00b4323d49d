"""The progress bar on standard error, and lines above it."""

import sys
from typing import TextIO

import jax
from tqdm import tqdm

from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.run import Numbers, Run

# A log file is no terminal: there the bar is a line every half minute.
SECONDS_ON_TERMINAL, SECONDS_IN_FILE = 0.2, 30


class ProgressBar(Hook):
    """Shows how many steps were made, the newest loss and the tokens per second, on process 0."""

    def __init__(self):
        self._bar: tqdm | None = None

    def start(self, run: Run) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=run.steps,
            initial=run.first,
            unit="step",
            dynamic_ncols=True,
            mininterval=SECONDS_ON_TERMINAL if sys.stderr.isatty() else SECONDS_IN_FILE,
            disable=jax.process_index() != 0,
        )

    def on_numbers(self, run: Run, numbers: Numbers) -> None:
        """Show one more step."""
        self._bar.update(numbers.step - self._bar.n)
        speed = "" if run.tokens_per_second is None else f", {run.tokens_per_second:,.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {numbers.metrics['loss']:.4f}{speed}", refresh=False)

    def close(self) -> None:
        """Leave the bar as it is, and go to the next line."""
        if self._bar is not None:
            self._bar.close()


def say_above_bar(text: str, *, file: TextIO | None = None) -> None:
    """Print a line on process 0 without tearing the progress bar; `file` is standard output by default."""
    if jax.process_index() == 0:
        tqdm.write(text, file=file)
