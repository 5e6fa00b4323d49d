"""What a log file and a terminal show of a run's progress."""

import io
import sys

import pytest

from hybridnorm_jax.streams import can_redraw, duration
from hybridnorm_jax.training.hooks.progress_bar import ProgressLines


class _Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_a_line_every_half_minute(capsys):
    now = _Clock()
    lines = ProgressLines(steps=1000, first=100, now=now)
    for step in range(101, 126):
        now.seconds += 5
        lines.update(step, f"loss {step}")
    lines.close()
    told = capsys.readouterr().err
    assert told.splitlines() == [
        "step 101/1000: loss 101",
        "step 107/1000: loss 107, 1 h 14 min left",
        "step 113/1000: loss 113, 1 h 13 min left",
        "step 119/1000: loss 119, 1 h 13 min left",
        "step 125/1000: loss 125, 1 h 12 min left",
    ]


def test_the_last_step_is_always_shown(capsys):
    lines = ProgressLines(steps=3, first=0, now=_Clock())
    for step in (1, 2):
        lines.update(step, "loss")
    lines.close()  # stopped after step 2
    assert capsys.readouterr().err == "step 1/3: loss\nstep 2/3: loss\n"
    lines = ProgressLines(steps=3, first=0, now=_Clock())
    for step in (1, 2, 3):
        lines.update(step, "loss")
    lines.close()
    assert capsys.readouterr().err == "step 1/3: loss\nstep 3/3: loss\n"
    ProgressLines(steps=3, first=3).close()
    assert capsys.readouterr().err == ""


def test_a_bar_is_drawn_on_terminals_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert can_redraw(_Terminal())
    assert not can_redraw(io.StringIO())
    assert not can_redraw(None)
    monkeypatch.setenv("TERM", "dumb")
    assert not can_redraw(_Terminal())
    assert sys.stderr is None or not can_redraw(sys.stderr)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (750, "12 min 30 s"), (19200, "5 h 20 min")],
)
def test_durations_are_rounded_for_people(seconds, text):
    assert duration(seconds) == text
