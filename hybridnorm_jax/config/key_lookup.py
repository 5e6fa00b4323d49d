"""Every key of a run: the fields of RunConfig by their dotted names."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig

# Below this ratio of difflib two names are strangers.
ALIKE = 0.6
# Names of keys are shorter; of a long text difflib would think for minutes.
LONGEST = 100

SECTIONS = {field.name: field.type for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)}


def _all_fields() -> dict[str, dataclasses.Field]:
    fields = {}
    for field in dataclasses.fields(RunConfig):
        if field.name in SECTIONS:
            for inner in dataclasses.fields(field.type):
                fields[f"{field.name}.{inner.name}"] = inner
        else:
            fields[field.name] = field
    return fields


FIELDS = _all_fields()
# What a saved configuration may hold besides, of an encoder; no run trains one.
ENCODER_FIELDS = {
    f"model.{field.name}": field for field in dataclasses.fields(EncoderConfig) if f"model.{field.name}" not in FIELDS
}


def record_of(annotation: Any) -> type | None:
    """The dataclass of which a key such as data.mixture holds a map (name -> values); None: it holds something else."""
    if typing.get_origin(annotation) is dict and dataclasses.is_dataclass(inner := typing.get_args(annotation)[1]):
        return inner
    return None


# Keys whose entries have keys of their own: data.mixture.NAME.weight. Each with its entries' fields by name.
RECORDS = {
    path: {inner.name: inner for inner in dataclasses.fields(record)}
    for path, field in FIELDS.items()
    if (record := record_of(field.type)) is not None
}


class EntryKey(NamedTuple):
    """A key of an entry of a map, such as data.mixture.web.weight: the map, the entry and the entry's key."""

    map: str
    entry: str
    name: str

    @property
    def field(self) -> dataclasses.Field | None:
        """The field that says what it means; None: entries have no such key, or it is the whole entry."""
        return RECORDS[self.map].get(self.name)


def entry_key(path: str) -> EntryKey | None:
    """What a dotted path below a map of RECORDS names; None: it is none. `name` is empty for a whole entry."""
    for key in RECORDS:
        if path.startswith(f"{key}."):
            entry, _, name = path.removeprefix(f"{key}.").partition(".")
            return EntryKey(key, entry, name)
    return None


def default(field: dataclasses.Field) -> Any:
    """The value of a key that nobody sets."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs of nested dicts, also of the entries of RECORDS; an empty section has none."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if path in SECTIONS and value is None:
            continue
        if isinstance(value, dict) and value and (path not in FIELDS or path in RECORDS):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def nearest_key(path: str) -> str | None:
    """The key that `path` was probably meant to be, None where no key is like it.

    The last part of the name counts most: model.seq_len is taken for train.seq_len.
    """
    path = path[:LONGEST]

    def likeness(known: str) -> tuple[float, float]:
        last = difflib.SequenceMatcher(None, known.rpartition(".")[2], path.rpartition(".")[2])
        whole = difflib.SequenceMatcher(None, known, path)
        return last.ratio(), whole.ratio()

    nearest = max(FIELDS, key=likeness)
    of_last_part, _ = likeness(nearest)
    return nearest if of_last_part > ALIKE else None
