"""`hybridnorm runs`: the runs of a folder at a glance, and what makes some of them different."""

import json
import math
import time
from collections.abc import Sequence

from hybridnorm_jax.commands.program import ArgumentParser
from hybridnorm_jax.commands.syntax import check_syntax
from hybridnorm_jax.config.run_config import RunSection
from hybridnorm_jax.errors import one_line
from hybridnorm_jax.streams import duration
from hybridnorm_jax.training.run_listing import SORTS, Listed, RunGroup, list_runs, validation_loss
from hybridnorm_jax.training.run_status import RunStatus

COMPARE = "compare"
DAY = 86_400
USAGE = "hybridnorm runs [DIR] [--sort COLUMN] [--json]\n       hybridnorm runs compare RUN RUN [RUN ...] [--json]"
DESCRIPTION = f"""The runs in a folder (default: {RunSection.dir}): step, newest losses, tokens per second,
and status. A comparison of the lab is one row; name its folder to see its runs.

  running        a process holds the run's lock
  finished       it made all its steps and was evaluated
  stopped        by a signal; the same command goes on
  failed         why is said behind it; also of a process that was killed
  never started  there is only its configuration
  saved          parameters that another command wrote, such as convert
  damaged        something in it cannot be read
  no run         a folder without a config.yaml"""
HEADINGS = ("name", "scheme", "step", "train loss", "validation", "tokens/s", "age", "status")
RIGHT = {"step", "train loss", "validation", "tokens/s", "age"}


def run(arguments: Sequence[str]) -> None:
    """`hybridnorm runs [DIR]`, or `hybridnorm runs compare RUN RUN ...`."""
    if arguments and arguments[0] == COMPARE:
        from hybridnorm_jax.commands.runs_compare import run as compare  # imports JAX

        compare(arguments[1:])
        return
    check_syntax("runs", arguments)
    parser = ArgumentParser("hybridnorm runs", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("folder", metavar="DIR", nargs="?", default=RunSection.dir, help="a folder of runs, or one run")
    parser.add_argument("--sort", choices=tuple(SORTS), default="age", metavar="COLUMN", help=f"{', '.join(SORTS)}")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    asked = parser.parse_args(list(arguments))
    listed = sorted(list_runs(asked.folder), key=SORTS[asked.sort])
    if asked.json:
        print(json.dumps([one.as_json() for one in listed], indent=2))
    elif listed:
        print(table(HEADINGS, [_row(one) for one in listed], right=RIGHT))
    else:
        print(f"{asked.folder}: no runs in it")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[str]) -> str:
    """Rows in columns of equal width; those of the headings in `right` end at their right side."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    lines = []
    for row in [headings, *rows]:
        cells = [
            cell.rjust(width) if heading in right else cell.ljust(width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(listed: Listed) -> tuple[str, ...]:
    return _row_of_group(listed) if isinstance(listed, RunGroup) else _row_of_run(listed)


def _row_of_run(listed: RunStatus) -> tuple[str, ...]:
    newest = listed.newest
    step = "" if newest.step is None and listed.steps is None else f"{newest.step or 0:,}/{listed.steps or 0:,}"
    status = f"{listed.status}: {listed.why}" if listed.why else listed.status
    return (
        listed.name,
        listed.scheme or "",
        step,
        loss_text(newest.loss),
        loss_text(validation_loss(listed)),
        "" if newest.rate is None else f"{newest.rate:,.0f}",
        _age(listed.written),
        status,
    )


def _row_of_group(group: RunGroup) -> tuple[str, ...]:
    schemes = {listed.scheme for listed in group.runs if listed.scheme}
    kind = "comparison" if group.is_comparison else "folder"
    counts = ", ".join(f"{count} {status}" for status, count in group.statuses.items())
    size = "1 run" if len(group.runs) == 1 else f"{len(group.runs)} runs"
    best = group.best
    return (
        f"{group.name}/",
        f"{len(schemes)} schemes" if len(schemes) != 1 else schemes.pop(),
        "",
        "",
        "" if best is None else loss_text(validation_loss(best)),
        "",
        _age(group.written),
        f"{kind} of {size}: {counts}" + ("" if best is None else f"; the best is {best.name}"),
    )


def loss_text(loss: float | None) -> str:
    """With four decimals; nothing where it is unknown."""
    if loss is None:
        return ""
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def _age(written: float | None) -> str:
    if written is None:
        return ""
    seconds = max(time.time() - written, 0)
    return duration(seconds) if seconds < DAY else f"{seconds / DAY:.1f} d"
