"""Every key with its type, value and meaning, for --help."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

from hybridnorm_jax.config import configurations
from hybridnorm_jax.config.arguments import DEFAULT, sort
from hybridnorm_jax.config.yaml_files import (
    FIELDS,
    SECTIONS,
    TYPE_WORDS,
    default,
    gather,
    read_file,
    show,
    without_none,
)

HELP_WIDTH = 120
VALUE_WIDTH = 24


def key_table(arguments: Sequence[str] = ()) -> str:
    """Every key with type, value and meaning, by section, in at most 120 columns.

    Values are the defaults, or those that the given configurations and overrides set.

    Raises:
      ConfigError: the arguments cannot be read, or set an unknown key or a wrong type.
    """
    files, overrides = sort(arguments)
    title = "value" if files or overrides else "default"
    files = files or [configurations.find(DEFAULT)]
    settings = gather([(str(file), read_file(file)) for file in files], overrides)
    rows = {
        path: (path, _type_name(field.type), show(settings.get(path, default(field))), field.metadata["meaning"])
        for path, field in FIELDS.items()
    }
    widths = [max(len(row[column]) for row in rows.values()) for column in range(2)]
    widths.append(min(VALUE_WIDTH, max(len(row[2]) for row in rows.values())))
    widths.append(HELP_WIDTH - sum(widths) - 2 * (len(widths) + 1))
    lines = _table_row(("key", "type", title, "meaning"), widths)
    for section in (*SECTIONS, ""):
        meaning = SECTIONS[section].__doc__.partition(".")[0] if section else "outside the sections"
        lines += ["", f"{section}: {meaning}".removeprefix(": ")]
        for path, row in rows.items():
            if path.rpartition(".")[0] == section:
                lines += _table_row(row, widths)
    return "\n".join(lines)


def _type_name(hint: Any) -> str:
    kind, optional = without_none(hint)
    return TYPE_WORDS[kind][0] + ("|null" if optional else "")


def _table_row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row as lines, the cells wrapped to their widths."""
    columns = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return [
        "  ".join(("", *(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)))).rstrip()
        for line in itertools.zip_longest(*columns, fillvalue="")
    ]
