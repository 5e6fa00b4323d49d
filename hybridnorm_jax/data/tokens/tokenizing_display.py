"""What a person sees while text is tokenized: a bar with rates on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Self

from tqdm import tqdm

from hybridnorm_jax.streams import can_redraw

# Where no bar is shown, a line says what takes longer than the first, and how far it is after each of the others.
QUIET_SECONDS = 3.0
LINE_SECONDS = 60.0


class Display:
    """Files that are read, and the tokens and bytes of text that are done, with their rates since this one began."""

    def __init__(self, name: str, files: int, *, shown: bool):
        """Begin.

        Args:
          name: of what is tokenized.
          files: how many there are.
          shown: whether anything is printed, on standard error.
        """
        self._name, self._files = name, files
        shows_bar = shown and can_redraw(sys.stderr)
        self._prints = shown and not shows_bar
        self._began = time.monotonic()
        self._next_line = self._began + QUIET_SECONDS
        self._has_begun = False
        self._first: tuple[int, int] | None = None
        self._bar = tqdm(total=files, desc="tokenizing", unit="file", leave=False, disable=not shows_bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, file: int, tokens: int, num_bytes: int) -> None:
        """So many files are read, and so many tokens are written, of so many bytes of text."""
        if self._first is None:
            self._first = tokens, num_bytes
        self._bar.n = file
        self._bar.set_postfix_str(self._rates(tokens, num_bytes))
        now = time.monotonic()
        if self._prints and now >= self._next_line:
            far = f": file {file + 1:,} of {self._files:,}, {self._rates(tokens, num_bytes)}"
            print(f"tokenizing {self._name}{far if self._has_begun else ''}", file=sys.stderr, flush=True)
            self._has_begun, self._next_line = True, now + LINE_SECONDS

    def _rates(self, tokens: int, num_bytes: int) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        per_second = (tokens - self._first[0]) / seconds
        megabytes = (num_bytes - self._first[1]) / seconds / 1e6
        return f"{tokens:,} tokens, {per_second:,.0f} tokens/s, {megabytes:.1f} MB/s"
