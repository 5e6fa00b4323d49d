"""What can be shown where a program writes: a line that is drawn again and again, or whole lines only."""

import os
from typing import TextIO


def can_redraw(stream: TextIO | None) -> bool:
    """Whether a progress bar works there: on a terminal that can move its cursor, not in a file or a pipe."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """As 45 s, 12 min 30 s or 5 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
