"""How the lab's figures look: one line style and marker per label, and figures as SVG text or PNG files.

Lines are told apart by style and marker as well as by color, so figures can be read in black and white. matplotlib is
the extra `lab` and is imported when the first figure is made.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hybridnorm_jax.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOLID, DASHED, DOTTED, DASH_DOT = "-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))
LONG, DASH_DOT_DOT = (0, (10, 2)), (0, (5, 1.5, 1, 1.5, 1, 1.5))
BLACK, BLUE, RED, GREEN = "#000000", "#0060a8", "#c1272d", "#1b7837"
PURPLE, BROWN, TEAL, GRAY = "#762a83", "#8c510a", "#01778a", "#666666"


@dataclasses.dataclass(frozen=True)
class Style:
    """What tells one label's line from another's, in matplotlib's terms."""

    color: str
    linestyle: str | tuple
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of matplotlib's plot() for a line without markers."""
        return {"color": self.color, "linestyle": self.linestyle}

    @property
    def points(self) -> dict[str, Any]:
        """Arguments of matplotlib's plot() for a line with markers."""
        return {**self.line, "marker": self.marker}


FIXED = {
    "pre": Style(BLACK, SOLID, "o"),
    "post": Style(RED, DASHED, "s"),
    "hybrid": Style(BLUE, DASH_DOT, "^"),
    "hybrid_star": Style(GREEN, DOTTED, "*"),
    "hybrid_depth_scaled": Style(TEAL, LONG, "v"),
    "span": Style(PURPLE, LONG, "D"),
    "peri": Style(BROWN, DASH_DOT_DOT, "P"),
    "deepnorm": Style(GRAY, SOLID, "X"),
    "sandwich": Style(BROWN, DOTTED, "<"),
    "reordered": Style(TEAL, DASHED, ">"),
    "keel": Style(PURPLE, DASHED, "p"),
    "mix_ln": Style(GREEN, DASH_DOT_DOT, "h"),
    "b2t": Style(RED, SOLID, "d"),
    "layernorm_scaling": Style(GRAY, DASH_DOT, "8"),
}
# For every other label; the markers are not among those above.
OTHER_MARKERS = ("x", "+", "1", "2", "3", "4", "|", "H")
OTHER_LINES = (DASH_DOT, DOTTED, DASHED, LONG, DASH_DOT_DOT, SOLID)
OTHER_COLORS = (BLUE, RED, GREEN, PURPLE, BROWN, TEAL, GRAY, BLACK)
# Each color, with its marker, once with each line. From one style to the next all three change.
OTHER = tuple(
    Style(OTHER_COLORS[(index + shift) % 8], line, OTHER_MARKERS[(index + shift) % 8])
    for index in range(8)
    for shift, line in enumerate(OTHER_LINES)
)

PARAMETERS = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "hybridnorm",
    "figure.facecolor": "white",
}


def style_of(label: str) -> Style:
    """The style of a label, the same in every figure.

    FIXED has the common schemes. For every other label a hash decides, but "pre, num_layers=29" has the color of pre.
    Two labels that are not in FIXED may share a style; `styles_of` keeps the labels of one figure apart.
    """
    if label in FIXED:
        return FIXED[label]
    style = OTHER[_hash(label) % len(OTHER)]
    scheme = label.partition(",")[0]
    return dataclasses.replace(style, color=FIXED[scheme].color) if scheme in FIXED else style


def styles_of(labels: Iterable[str]) -> dict[str, Style]:
    """`style_of` each label; where two labels share one, the later one in the alphabet takes the next that is free.

    OTHER has 48 styles. With more labels outside FIXED, styles repeat.
    """
    chosen: dict[str, Style] = {}
    for label in sorted(set(labels)):
        style = style_of(label)
        if style in chosen.values():
            first = _hash(label) % len(OTHER)
            free = [other for other in OTHER[first:] + OTHER[:first] if other not in chosen.values()]
            style = free[0] if free else style
        chosen[label] = style
    return chosen


def figure(columns: int = 1, rows: int = 1, *, width: float = 6.4, height: float = 3.6) -> tuple["Figure", Any]:
    """An empty figure and its axes.

    Args:
      columns, rows: how many axes.
      width, height: of the whole figure, in inches.

    Returns:
      (matplotlib Figure, array of Axes with shape [rows, columns]).

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(PARAMETERS):
        made = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        return made, made.subplots(rows, columns, squeeze=False)


def legend_above(figure: "Figure", columns: int = 3) -> None:
    """Put one legend for all axes of the figure above them, where it covers no data; it has each label once."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper left",
            ncols=min(columns, len(handles)),
            frameon=False,
            fontsize=9,
            handlelength=3.5,
        )


def svg(figure: "Figure", name: str) -> str:
    """The figure as an <svg> element for an HTML page, without prolog and metadata.

    Args:
      name: letters, digits and hyphens. It goes before every id, because two figures of a page may have the same ids.
    """
    buffer = io.StringIO()
    with _matplotlib().rc_context(PARAMETERS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    _keep_layout(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)


def save_png(figure: "Figure", path: str | Path, dots_per_inch: int = 150) -> None:
    """Write the figure as a PNG file into a directory that exists.

    Raises:
      UserError: the file cannot be written.
    """
    with _matplotlib().rc_context(PARAMETERS):
        try:
            figure.savefig(path, format="png", dpi=dots_per_inch, metadata={"Software": None})
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    _keep_layout(figure)


def _keep_layout(figure: "Figure") -> None:
    """Keep the figure as it was saved: to lay it out again would move it a little, and takes long."""
    figure.set_layout_engine("none")


def _hash(label: str) -> int:
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big")


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("figures", extra="lab") from error
    return matplotlib
