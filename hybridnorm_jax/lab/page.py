"""A report's blocks, and how they become one HTML page or Markdown. Everything from outside is escaped here."""

import dataclasses
import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridnorm_jax.lab import styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; padding-top: 0.4rem; border-top: 1px solid #bbb; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.4rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; }
a { color: #0645ad; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 0.3rem; color: #333; }
caption span { display: inline-block; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #555; vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody th, tbody td { white-space: nowrap; }
tbody .long { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
th.number, td.number { text-align: right; }
td.shade { border: 1px solid #888; color: #000; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
td.failed { border: 3px double #000; font-weight: 600; }
td.none { background: repeating-linear-gradient(135deg, #fff 0 7px, #ddd 7px 9px);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { font-size: 0.9rem; color: #333; max-width: 46rem; }
dt { font-weight: 600; margin-top: 0.6rem; overflow-wrap: anywhere; }
dd { margin: 0; }
code { font: 0.85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) { table.pairs td { white-space: normal; min-width: 0; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  caption span { max-width: none; }
  figure, tr { break-inside: avoid; }
  caption { break-after: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
# Characters of a cell that is not broken into lines, which on a phone would be one word each.
LONG = 40


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section (level 2) or a part of one (level 3)."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
      shade: 0 (white) to 1 (the darkest gray that black text is read on); None: no shading.
      failed: framed, and hatched if it has no shade; the text says what failed.
    """

    text: str
    shade: float | None = None
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first column heads its rows.

    Attributes:
      columns: names; one that begins with "#" holds numbers, which are aligned at the right ("#" is not shown).
      rows: as many cells each.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure; `name` is that of its file, and unique."""

    name: str
    figure: "Figure"
    caption: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """(term, command) pairs."""

    items: Sequence[tuple[str, str]]


Block = Heading | Paragraph | Table | Picture | Listing


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file, no network and no script; figures are inline SVG."""
    headings = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<li><a href="#{_anchor(h.text)}">{html.escape(h.text)}</a></li>' for h in headings)
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n{body}\n</main>\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same; a figure is a link to figures/<name>.png."""
    return "\n\n".join([f"# {_plain(title)}", *map(_markdown, blocks)]) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            anchor = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Table():
            return _html_table(block)
        case Picture(name, figure, caption):
            image = styles.svg(figure, name).replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
            return f"<figure>\n{image}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
        case Listing(items):
            lines = (f"<dt>{html.escape(term)}</dt><dd><code>{html.escape(code)}</code></dd>" for term, code in items)
            return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def _html_table(table: Table) -> str:
    numbers = [name.startswith("#") for name in table.columns]
    classes = [' class="number"' if number else "" for number in numbers]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(name.removeprefix("#"))}</th>'
        for name, kind in zip(table.columns, classes, strict=True)
    )
    rows = "\n".join(f"<tr>{_html_row(row, numbers)}</tr>" for row in table.rows)
    caption = html.escape(table.caption)
    pairs = ' class="pairs"' if len(numbers) == 2 else ""
    # Focusable, so that a keyboard can scroll a table that is wider than the screen.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table{pairs}>\n'
        f"<caption><span>{caption}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _html_row(row: Sequence[str | Cell], numbers: Sequence[bool]) -> str:
    parts = []
    for index, (item, number) in enumerate(zip(row, numbers, strict=True)):
        cell = item if isinstance(item, Cell) else Cell(item)
        marks = (("number", number), ("failed", cell.failed), ("long", len(cell.text) > LONG))
        names = [name for name, holds in marks if holds]
        look = ""
        if cell.failed and cell.shade is None:
            names.append("none")
        if cell.shade is not None:
            names.append("shade")
            # Down to #b0b0b0, on which black has a contrast of 9.7.
            look = f' style="background:#{f"{round(255 - 79 * cell.shade):02x}" * 3}"'
        kind = f' class="{" ".join(names)}"' if names else ""
        tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
        parts.append(f"<{tag}{scope}{kind}{look}>{html.escape(cell.text)}</{tag}>")
    return "".join(parts)


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Table(caption, columns, rows):
            rule = ["---:" if name.startswith("#") else "---" for name in columns]
            lines = [[_plain(name.removeprefix("#")) for name in columns], rule]
            lines += [[_plain(item.text if isinstance(item, Cell) else item) for item in row] for row in rows]
            return f"{_plain(caption)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(name, _, caption):
            return f"![{_plain(caption)}](figures/{name}.png)\n\n{_plain(caption)}"
        case Listing(items):
            return "\n".join(f"- {_plain(term)}: {_code(code)}" for term, code in items)


def _plain(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is; on one line, as a cell of a table must be."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", text)
    return html.escape(text, quote=False)


def _code(text: str) -> str:
    """Between more backticks than the text has in a row."""
    text = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
