"""A report as Markdown. All text is escaped here."""

import html
import re
from collections.abc import Sequence

from hybridnorm_jax.lab.report.blocks import Block, Cell, Heading, Listing, Paragraph, Picture, Table


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; a figure is a link to figures/<name>.png."""
    return "\n\n".join([f"# {_plain(title)}", *map(_markdown, blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_plain(block.text)}"
        case Paragraph():
            return _plain(block.text)
        case Table():
            return _table(block)
        case Picture():
            caption = _plain(block.caption)
            return f"![{caption}](figures/{block.name}.png)\n\n{caption}"
        case Listing():
            return "\n".join(f"- {_plain(command.name)}: {_code(command.text)}" for command in block.commands)


def _table(table: Table) -> str:
    names = [_plain(column.name) for column in table.columns]
    alignments = ["---:" if column.holds_numbers else "---" for column in table.columns]
    rows = [[_plain(cell.text if isinstance(cell, Cell) else cell) for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in (names, alignments, *rows)]
    return f"{_plain(table.caption)}\n\n" + "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Markdown, and HTML inside Markdown, shows as it is. One line, as the cell of a table must be."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", text)
    return html.escape(text, quote=False)


def _code(text: str) -> str:
    """Code, between more backticks than the text has in a row."""
    text = " ".join(text.split())
    longest = max((len(backticks) for backticks in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{text}{fence}" if longest == 0 else f"{fence} {text} {fence}"
