"""The files of a report: report.html, report.md with figures/, report.csv and tables/, beside the runs."""

import csv
import io
from pathlib import Path
from typing import Any

from hybridnorm_jax.errors import UserError, did_you_mean
from hybridnorm_jax.lab.figure_styles import save_png
from hybridnorm_jax.lab.report.blocks import Picture, Table
from hybridnorm_jax.lab.report.html_page import to_html
from hybridnorm_jax.lab.report.markdown_page import to_markdown
from hybridnorm_jax.lab.report.sections import report_blocks
from hybridnorm_jax.lab.report.statistics import ComparedRuns, natural_order
from hybridnorm_jax.lab.report.table_files import write_tables
from hybridnorm_jax.lab.run_files import read_comparison
from hybridnorm_jax.lab.runs import Run, read_runs

TITLE = "Norm placements compared"


def write_report(directory: str | Path, baseline: str | None = None, *, speed: bool = False) -> Path:
    """Write report.html, report.md, report.csv, figures/ and tables/ into a directory of runs; returns the page's path.

    Args:
      directory: its subdirectories with a config.yaml are the runs; comparison.json, if there, says what made them.
      baseline: a label, or a scheme that only one label has. None: what comparison.json names as `baseline`, or else
        the scheme pre; and the first label where no run has that.
      speed: whether tokens per second are shown.

    Raises:
      UserError: the runs cannot be read or compared (see read_runs), there is no such baseline, or matplotlib is not
        installed.
    """
    directory = Path(directory)
    runs = read_runs(directory)
    made_by = read_comparison(directory / "comparison.json")
    schemes = {run.label: run.scheme for run in runs}
    label = _default_baseline(schemes, made_by) if baseline is None else _named_baseline(schemes, baseline)
    compared = ComparedRuns(directory=directory, runs=runs, baseline=label, made_by=made_by, shows_speed=speed)
    blocks = report_blocks(compared)
    (directory / "figures").mkdir(exist_ok=True)
    for block in blocks:
        if isinstance(block, Picture):
            save_png(block.figure, directory / "figures" / f"{block.name}.png")
    write_tables([block for block in blocks if isinstance(block, Table)], directory / "tables")
    (directory / "report.csv").write_text(_csv(compared), encoding="utf-8")
    (directory / "report.md").write_text(to_markdown(TITLE, blocks), encoding="utf-8")
    (directory / "report.html").write_text(to_html(TITLE, blocks), encoding="utf-8")
    return directory / "report.html"


def _default_baseline(schemes: dict[str, str], made_by: dict[str, Any]) -> str:
    """The label to compare with where none is named, from label -> scheme."""
    meant = made_by.get("baseline", "pre")
    matching = [label for label, scheme in schemes.items() if meant in (label, scheme)]
    return min(matching or schemes, key=natural_order)


def _named_baseline(schemes: dict[str, str], name: str) -> str:
    """The label that a label or a scheme names, from label -> scheme."""
    if name in schemes:
        return name
    matching = sorted(label for label, scheme in schemes.items() if scheme == name)
    if not matching:
        known = set(schemes) | set(schemes.values())
        raise UserError(f"baseline={name}: no run has it{did_you_mean(name, known)}")
    if len(matching) > 1:
        raise UserError(f"baseline={name}: is any of {'; '.join(map(repr, matching))}: name one of them")
    return matching[0]


def _csv(compared: ComparedRuns) -> str:
    """A row per run, of its numbers as they are; what is unknown is empty."""
    rows = [_csv_row(run, compared.numbers[run.name]) for run in compared.runs]
    # Runs that finished have more columns than others: their losses on the validation sets.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(run: Run, numbers: dict[str, Any]) -> dict[str, Any]:
    versions = run.result.get("versions", {})
    return {
        "run": run.name,
        "label": run.label,
        "scheme": run.scheme,
        "learning_rate": run.rate,
        "seed": run.seed,
        "status": run.status,
        **numbers,
        "hardware": run.result.get("hardware"),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
        "command": run.result.get("command"),
    }
