"""Every key with its value, type and meaning, for --help."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from hybridnorm_jax.config.arguments import read, sort
from hybridnorm_jax.config.key_lookup import FIELDS, RECORDS, SECTIONS, default
from hybridnorm_jax.config.key_values import type_name
from hybridnorm_jax.config_fields import spelled

WIDTH = 80
INDENT = " " * 6


class Row(NamedTuple):
    """One key: `train.steps=1000`, `integer`, `optimizer steps in all`."""

    setting: str
    type: str
    meaning: str


def key_table(arguments: Sequence[str] = ()) -> str:
    """Every key as key=value with its type and meaning, by section, in at most 80 columns.

    Values are the defaults, or those that the given configurations and overrides set.

    Raises:
      ConfigError: the arguments cannot be read, or set an unknown key or a wrong type.
    """
    files, overrides = sort(arguments)
    settings = read(files, overrides)
    rows = {
        path: Row(f"{path}={spelled(settings.get(path, default(field)))}", type_name(field.type), meaning(field))
        for path, field in FIELDS.items()
    }
    lines = _lines(Row("key=value" if arguments else "key=default", "type", "meaning"))
    for section, kind in SECTIONS.items():
        lines += ["", *textwrap.wrap(f"{section}: {_first_sentence(kind.__doc__)}", WIDTH)]
        for path, row in rows.items():
            if path.startswith(f"{section}."):
                lines += _lines(row)
                for name, field in RECORDS.get(path, {}).items():
                    setting = f"{path}.NAME.{name}={spelled(default(field))}"
                    lines += _lines(Row(setting, type_name(field.type), meaning(field)))
    lines += ["", "outside the sections"]
    for path, row in rows.items():
        if "." not in path:
            lines += _lines(row)
    return "\n".join(lines)


def meaning(field: dataclasses.Field) -> str:
    """What a key means, and which numbers it may have."""
    limits = field.metadata["range"]
    return field.metadata["meaning"] if limits is None else f"{field.metadata['meaning']} [{limits}]"


def _first_sentence(text: str) -> str:
    return text.splitlines()[0].partition(". ")[0].removesuffix(".")


def _lines(row: Row) -> list[str]:
    """The key with its value and type, and below it the meaning."""
    key = f"{row.setting}  ({row.type})"
    return [
        *textwrap.wrap(key, WIDTH, initial_indent="  ", subsequent_indent=INDENT, break_on_hyphens=False),
        *textwrap.wrap(row.meaning, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False),
    ]
