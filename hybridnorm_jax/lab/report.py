"""The report of a comparison: report.html, report.md with figures/, and report.csv, from its runs' directories."""

import csv
import io
from pathlib import Path
from typing import Any

from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.lab import page, sections, statistics, styles
from hybridnorm_jax.lab.runs import read_object, read_runs

TITLE = "Norm placements compared"


def write_report(directory: str | Path, baseline: str | None = None) -> Path:
    """Write report.html, report.md, report.csv and figures/*.png into a directory of runs; returns report.html's path.

    Args:
      directory: its subdirectories with a config.yaml are the runs; comparison.json, if there, says what made them.
      baseline: a label, or a scheme that only one label has; None: `baseline` of comparison.json, or pre, or the
        first label.

    Raises:
      UserError: the runs cannot be read or compared (see read_runs), there is no such baseline, or matplotlib is not
        installed.
    """
    directory = Path(directory)
    runs = read_runs(directory)
    file = directory / "comparison.json"
    made_by = read_object(file) if file.exists() else {}
    comparison = statistics.Comparison(
        directory, runs, _baseline({run.label: run.scheme for run in runs}, baseline, made_by), made_by
    )
    blocks = sections.blocks(comparison)
    (directory / "figures").mkdir(exist_ok=True)
    for block in blocks:
        if isinstance(block, page.Picture):
            styles.save_png(block.figure, directory / "figures" / f"{block.name}.png")
    (directory / "report.csv").write_text(_csv(comparison), encoding="utf-8")
    (directory / "report.md").write_text(page.to_markdown(TITLE, blocks), encoding="utf-8")
    (directory / "report.html").write_text(page.to_html(TITLE, blocks), encoding="utf-8")
    return directory / "report.html"


def _baseline(schemes: dict[str, str], asked: str | None, made_by: dict[str, Any]) -> str:
    """The label that is meant, of label -> scheme."""
    if asked is None:
        meant = made_by.get("baseline", "pre")
        matching = [label for label, scheme in schemes.items() if meant in (label, scheme)]
        return min(matching or schemes)
    if asked in schemes:
        return asked
    matching = sorted(label for label, scheme in schemes.items() if scheme == asked)
    if not matching:
        raise UserError(f"baseline={asked}: no run has it{did_you_mean(asked, {*schemes, *schemes.values()})}")
    if len(matching) > 1:
        raise UserError(f"baseline={asked}: is any of {'; '.join(map(repr, matching))}: name one of them")
    return matching[0]


def _csv(comparison: statistics.Comparison) -> str:
    """A row per run, of its numbers as they are; what is unknown is empty."""
    rows = [
        {
            "run": run.name,
            "label": run.label,
            "scheme": run.scheme,
            "learning_rate": run.rate,
            "seed": run.seed,
            "status": run.status,
            **comparison.numbers[run.name],
            "hardware": run.result.get("hardware"),
            "versions": " ".join(f"{name}={version}" for name, version in run.result.get("versions", {}).items()),
            "command": run.result.get("command"),
        }
        for run in comparison.runs
    ]
    # Which validation sets there are differs between runs that finished and others.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
