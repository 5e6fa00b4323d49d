"""A table of the report as files of its own: CSV and JSON with unrounded numbers, and LaTeX as the page shows it."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridnorm_jax.lab.report.blocks import Cell, Table
from hybridnorm_jax.lab.report.formats import NONE

MINUS, ARROW, TIMES = "\N{MINUS SIGN}", "\N{RIGHTWARDS ARROW}", "\N{MULTIPLICATION SIGN}"
# One character each, so that what one replacement writes is not replaced again.
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        NONE: "---",
        MINUS: "$-$",
        ARROW: r"$\rightarrow$",
        TIMES: r"$\times$",
        "\n": " ",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def write_tables(tables: Sequence[Table], directory: Path) -> None:
    """Write NAME.csv, NAME.json and NAME.tex for each table, into a directory that is made if need be."""
    directory.mkdir(exist_ok=True)
    for table in tables:
        for ending, text in (("csv", to_csv(table)), ("json", to_json(table)), ("tex", to_latex(table))):
            (directory / f"{table.name}.{ending}").write_text(text, encoding="utf-8")


def to_csv(table: Table) -> str:
    """A line per row. Numbers are unrounded, an interval has two columns, and what is unknown is empty."""
    values = [[_value(item) for item in row] for row in table.rows]
    ends = [any(isinstance(row[index], tuple) for row in values) for index in range(len(table.columns))]
    names = [column.name for column in table.columns]
    header = [name for name, is_interval in zip(names, ends, strict=True) for name in _columns(name, is_interval)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in values:
        writer.writerow([each for value, two in zip(row, ends, strict=True) for each in _entries(value, two)])
    return text.getvalue()


def _columns(name: str, is_interval: bool) -> list[str]:
    return [f"{name}, low", f"{name}, high"] if is_interval else [name]


def _entries(value: Any, is_interval: bool) -> list[Any]:
    """What stands in the columns of one value; None is written as nothing."""
    if not is_interval:
        return [value]
    return list(value) if isinstance(value, tuple) else [None, None]


def to_json(table: Table) -> str:
    """An object with the table's name and caption, and a list of rows, each from a column's name to its value.

    A value is an unrounded number, the two ends of an interval, a text, or null where it is unknown.
    """
    names = [column.name for column in table.columns]
    rows = [dict(zip(names, map(_value, row), strict=True)) for row in table.rows]
    content = {"name": table.name, "caption": table.caption, "rows": rows}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_latex(table: Table) -> str:
    """A table environment that needs the package booktabs, with the texts of the page, escaped."""
    alignments = "".join("r" if column.holds_numbers else "l" for column in table.columns)
    head = " & ".join(column.name.translate(LATEX) for column in table.columns)
    rows = [" & ".join(_text(item).translate(LATEX) for item in row) for row in table.rows]
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{table.caption.translate(LATEX)}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{alignments}}}",
        "\\toprule",
        f"{head} \\\\",
        "\\midrule",
        *(f"{row} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _text(item: str | Cell) -> str:
    return item.text if isinstance(item, Cell) else item


def _value(item: str | Cell) -> Any:
    """The number that a cell rounds, an interval, or its text; None where it shows that there is nothing."""
    value = item.value if isinstance(item, Cell) else None
    if value is None:
        text = _text(item)
        return None if text == NONE else text.replace(MINUS, "-")
    if isinstance(value, tuple):
        return value
    return value if math.isfinite(value) else None
