"""What a logger is, and when it is called."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

# How a run can end, as `Logger.close` is told.
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


class Point(NamedTuple):
    """The single values of one line of metrics.jsonl, all of them finite, by name."""

    step: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """The run that a logger is to show.

    Attributes:
      directory: of the run; exists.
      name, project, group, tags: what it is called and belongs to; the group is "" for none.
      config: its whole configuration, as nested dicts.
      resume_step: the step that it goes on from; None: it begins, and what was logged before is of no run any more.
      history: what metrics.jsonl holds up to that step, in order.
      recorded: name -> the last step of which metrics.jsonl ever held a value, of superseded lines too.
    """

    directory: epath.Path
    name: str = ""
    project: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resume_step: int | None = None
    history: Sequence[Point] = ()
    recorded: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def last_steps(self) -> dict[str, int]:
        """Name -> the last step of which the history has a value."""
        return {name: point.step for point in self.history for name in point.values}


class Logger:
    """Shows the numbers of a run somewhere; a subclass overrides `write`, and the others where it needs them.

    All methods but `abandon` are called in one thread, which does nothing else, on process 0 alone. They may raise
    anything and may take long: metrics_writer.py gives up a logger that fails or does not answer, says so in one line,
    and the run goes on without it.

    Attributes:
      url: set by `start`: where people can look; printed once. None: nowhere.
    """

    url: str | None = None

    def start(self, run: LoggedRun) -> Mapping[str, int]:
        """Get ready to show this run, and hide what was logged of steps after run.resume_step, if that can be done.

        Returns:
          name -> the last step of which there is a value already. `write` then gets no value of that step or of an
          earlier one; what metrics.jsonl has after it, `write` gets first. By default that is what metrics.jsonl has
          up to the step that the run goes on from: `write` gets what is new.
        """
        return run.last_steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of one step, all of them finite; several calls may be about one step."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Called once it is given up, in another thread: what it leaves must not hold the end of the process.

        Must not wait, and gets no time limit.
        """

    def close(self, how: str) -> None:
        """Hand over everything and let go. `how` the run ends: FINISHED, STOPPED (it will go on later) or FAILED."""
