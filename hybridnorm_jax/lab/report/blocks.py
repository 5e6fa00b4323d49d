"""The blocks that a report consists of; html_page and markdown_page turn them into text."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Heading:
    """The heading of a section (level 2) or of a part of one (level 3)."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Column:
    """The heading of a table's column; numbers are aligned at the right."""

    name: str
    holds_numbers: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
      shade: 0 (white) to 1 (the darkest gray on which black text can be read); None: no shading.
      failed: the cell is framed, and hatched if it has no shade; its text says what failed.
      value: the number that the text rounds, or the two ends of an interval; None: there is only the text.
    """

    text: str
    shade: float | None = None
    failed: bool = False
    value: float | tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; its first column heads the rows.

    Attributes:
      name: of its files: letters, digits and hyphens, no other table's.
      rows: each has a cell for every column.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Cell]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
      name: of its file and of its ids in the page: letters, digits and hyphens, no other figure's.
    """

    name: str
    figure: "Figure"
    caption: str


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, or what is known instead of it, and the name it is listed under."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """Commands, one below the other."""

    commands: Sequence[Command]


Block = Heading | Paragraph | Table | Picture | Listing
