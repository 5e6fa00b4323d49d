"""Columns that several tables have, and cells that keep the number which they show."""

from collections.abc import Callable

from hybridnorm_jax.lab.report.blocks import Cell, Column

LABEL = Column("label")
RATE = Column("learning rate", holds_numbers=True)


def numbers(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name, holds_numbers=True) for name in names]


def shown(value: float | None, as_text: Callable[[float | None], str]) -> Cell:
    """A cell with a number and its text, which one of report/formats.py writes."""
    return Cell(as_text(value), value=value)
