"""Every key with its value, type and meaning, for --help."""

import dataclasses
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from hybridnorm_jax.config.arguments import read, sort
from hybridnorm_jax.config.key_lookup import FIELDS, SECTIONS, default
from hybridnorm_jax.config.key_values import show, type_name

WIDTH = 100
GAP = "  "
# A longer key=value, such as a list of files, goes over several lines.
LONGEST_SETTING = 40


class Row(NamedTuple):
    """One key: `train.steps=1000`, `integer`, `optimizer steps in all`."""

    setting: str
    type: str
    meaning: str


def key_table(arguments: Sequence[str] = ()) -> str:
    """Every key as key=value with its type and meaning, by section, in at most 100 columns.

    Values are the defaults, or those that the given configurations and overrides set.

    Raises:
      ConfigError: the arguments cannot be read, or set an unknown key or a wrong type.
    """
    files, overrides = sort(arguments)
    settings = read(files, overrides)
    rows = {
        path: Row(f"{path}={show(settings.get(path, default(field)))}", type_name(field.type), meaning(field))
        for path, field in FIELDS.items()
    }
    widths = _widths(list(rows.values()))
    lines = _lines(Row("key=value" if arguments else "key=default", "type", "meaning"), widths)
    for section, kind in SECTIONS.items():
        lines += ["", *textwrap.wrap(f"{section}: {_first_sentence(kind.__doc__)}", WIDTH)]
        for path, row in rows.items():
            if path.startswith(f"{section}."):
                lines += _lines(row, widths)
    lines += ["", "outside the sections"]
    for path, row in rows.items():
        if "." not in path:
            lines += _lines(row, widths)
    return "\n".join(lines)


def meaning(field: dataclasses.Field) -> str:
    """What a key means, and which numbers it may have."""
    limits = field.metadata["range"]
    return field.metadata["meaning"] if limits is None else f"{field.metadata['meaning']} [{limits}]"


def _first_sentence(text: str) -> str:
    return text.splitlines()[0].partition(". ")[0].removesuffix(".")


def _widths(rows: Sequence[Row]) -> list[int]:
    """Of the three columns."""
    setting = min(LONGEST_SETTING, max(len(row.setting) for row in rows))
    kind = max(len(row.type) for row in rows)
    return [setting, kind, WIDTH - setting - kind - 3 * len(GAP)]


def _lines(row: Row, widths: Sequence[int]) -> list[str]:
    """One row as lines, each cell wrapped to the width of its column."""
    cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        padded = [f"{part:{width}}" for part, width in zip(parts, widths, strict=True)]
        lines.append((GAP + GAP.join(padded)).rstrip())
    return lines
