"""Records of every format as rows: the fields of one record by name, and where it stands."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hybridnorm_jax.config.record_filter import field_value
from hybridnorm_jax.data.text.deep_json import kind_of
from hybridnorm_jax.errors import DataError

MOST_SHOWN = 200


class RecordRow(NamedTuple):
    """The fields of one record, at least those that were asked for, and where it stands (for messages)."""

    fields: Mapping[str, Any]
    place: str


def record_text(row: RecordRow, text_field: str) -> str:
    """The text of one record.

    Raises:
      DataError: the record has no text in the field; the message names its place.
    """
    field = f"field {text_field!r} (data.text_field)"
    text = field_value(row.fields, text_field)
    if isinstance(text, str):
        return text
    if text is None and not has_field(row.fields, text_field):
        raise DataError(f"{row.place}: the record has no {field}; it has: {shown_names(row.fields)}")
    kind = "bytes" if isinstance(text, bytes) else kind_of(text)
    raise DataError(f"{row.place}: {field} must hold a string, not {kind}")


def has_field(fields: Mapping[str, Any], name: str) -> bool:
    """Whether a record has a field, whatever it holds; `a.b` is a field in a field."""
    if name in fields:
        return True
    first, _, rest = name.partition(".")
    inner = fields.get(first)
    return bool(rest) and isinstance(inner, Mapping) and has_field(inner, rest)


def shown_names(names: Mapping[str, Any] | list[str]) -> str:
    """Names of fields for a message, shortened where there are many."""
    plain = ", ".join(names).encode("unicode_escape").decode()
    shown = plain if len(plain) <= MOST_SHOWN else f"{plain[:MOST_SHOWN]}..."
    return shown or "none"
