"""A report as one HTML page. All text is escaped here."""

import html
import re
from collections.abc import Sequence

from hybridnorm_jax.lab.figure_styles import svg
from hybridnorm_jax.lab.report.blocks import Block, Cell, Heading, Listing, Paragraph, Picture, Table

# The colors of the dark page; what matplotlib drew in a light one is exchanged for it (_themed).
DARK_COLORS = {
    "#ffffff": "#15181c",
    "#000000": "#f2f2f2",
    "#dddddd": "#3a3f45",
    "#0060a8": "#6cb6ff",
    "#c1272d": "#ff8a80",
    "#1b7837": "#6fcf7c",
    "#762a83": "#d3a4e6",
    "#8c510a": "#e0a458",
    "#01778a": "#4fd1dd",
    "#666666": "#a8a8a8",
}
CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --quiet: #333; --line: #ddd; --strong: #555;
  --link: #0645ad; --frame: #000; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e8e8e8; --quiet: #c4c8cc; --line: #3a3f45; --strong: #8a9099; --link: #8ab4f8;
    --frame: #fff; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; padding-top: 0.4rem; border-top: 1px solid var(--strong); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.4rem; }
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; }
a { color: var(--link); }
.scroll { overflow-x: auto; margin: 0.8rem 0; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 0.3rem; color: var(--quiet); }
caption span { display: inline-block; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--strong); vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody th, tbody td { white-space: nowrap; }
tbody .long { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
th.number, td.number { text-align: right; }
td.shade { border: 1px solid var(--strong); background: var(--light); color: #000;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
td.failed { border: 3px double var(--frame); font-weight: 600; }
td.none { background: repeating-linear-gradient(135deg, var(--paper) 0 7px, var(--line) 7px 9px);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
@media screen and (prefers-color-scheme: dark) { td.shade { background: var(--dark); color: #fff; } }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; min-width: calc(0.7 * var(--width)); height: auto; display: block; }
/* matplotlib names no black fill, because it is the default. */
figure svg { fill: var(--c000000, #000); }
figure svg text { fill: var(--ink); }
figcaption { font-size: 0.9rem; color: var(--quiet); max-width: 46rem; }
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
""".replace("DARK", " ".join(f"--c{light[1:]}: {dark};" for light, dark in DARK_COLORS.items()))
# A cell with more characters is broken into lines. On a phone, a short one would be broken after every word.
LONG = 32


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file, no network and no script; figures are inline SVG."""
    headings = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<li><a href="#{_anchor(text)}">{html.escape(text)}</a></li>' for text in headings)
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            anchor = f' id="{_anchor(block.text)}"' if block.level == 2 else ""
            return f"<h{block.level}{anchor}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{_with_code(block.text)}</p>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Listing():
            return _listing(block)


def _with_code(text: str) -> str:
    """Escaped text, in which what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _picture(picture: Picture) -> str:
    caption = html.escape(picture.caption)
    # A figure of two panels scrolls in its box on a phone: made as narrow as the screen, nobody could read it.
    width = f'style="--width: {picture.figure.get_figwidth():g}in"'
    image = _themed(svg(picture.figure, picture.name))
    image = image.replace("<svg", f'<svg role="img" aria-label="{caption}" {width}', 1)
    return (
        f'<figure>\n<div class="scroll" tabindex="0" role="region" aria-label="{caption}">{image}</div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _themed(image: str) -> str:
    """A figure whose colors are variables of the page, with what was drawn where the page does not set them."""
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", _variable, image)


def _variable(color: re.Match[str]) -> str:
    return f"var(--c{color[0][1:]}, {color[0]})" if color[0] in DARK_COLORS else color[0]


def _listing(listing: Listing) -> str:
    lines = [
        f"<dt>{html.escape(command.name)}</dt><dd><code>{html.escape(command.text)}</code></dd>"
        for command in listing.commands
    ]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def _table(table: Table) -> str:
    head = ""
    for column in table.columns:
        kind = ' class="number"' if column.holds_numbers else ""
        head += f'<th scope="col"{kind}>{html.escape(column.name)}</th>'
    rows = "\n".join(f"<tr>{_row(table, row)}</tr>" for row in table.rows)
    caption = html.escape(table.caption)
    pairs = ' class="pairs"' if len(table.columns) == 2 else ""
    # tabindex: a keyboard can then scroll a table that is wider than the screen.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table{pairs}>\n'
        f"<caption><span>{caption}</span></caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _row(table: Table, row: Sequence[str | Cell]) -> str:
    parts = []
    for index, (column, item) in enumerate(zip(table.columns, row, strict=True)):
        cell = item if isinstance(item, Cell) else Cell(item)
        look = _look(cell, holds_number=column.holds_numbers)
        text = html.escape(cell.text)
        parts.append(f'<th scope="row"{look}>{text}</th>' if index == 0 else f"<td{look}>{text}</td>")
    return "".join(parts)


def _look(cell: Cell, *, holds_number: bool) -> str:
    """The class and style attributes of a cell."""
    classes = []
    if holds_number:
        classes.append("number")
    if cell.failed:
        classes.append("failed")
    if len(cell.text) > LONG:
        classes.append("long")
    if cell.failed and cell.shade is None:
        classes.append("none")
    style = ""
    if cell.shade is not None:
        classes.append("shade")
        # Down to #b0b0b0, on which black has a contrast of 9.7; up to #5a5a5a, on which white has one of 6.9.
        light, dark = f"{round(255 - 79 * cell.shade):02x}", f"{round(24 + 66 * cell.shade):02x}"
        style = f' style="--light:#{light * 3};--dark:#{dark * 3}"'
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return kind + style


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
