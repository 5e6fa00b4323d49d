"""Which format of records a file has, and its rows: JSON, Parquet, Arrow, the members of a tar archive, or the
Examples of a TFRecord or ArrayRecord file.
"""

from collections.abc import Iterator, Sequence

from hybridnorm_jax.config.data_file_names import PLAIN_SUFFIXES, RECORD_SUFFIXES, TABLE_SUFFIXES, TAR_SUFFIXES
from hybridnorm_jax.data.places.remote_file import Place
from hybridnorm_jax.data.text.archives import chunks, is_packed, plain_name
from hybridnorm_jax.data.text.examples import array_record_records, example_fields, record_format, tfrecord_records
from hybridnorm_jax.data.text.record_rows import RecordRow
from hybridnorm_jax.data.text.records import record_fields, records
from hybridnorm_jax.data.text.tables import TABLES, table_rows
from hybridnorm_jax.data.text.tar_members import members
from hybridnorm_jax.data.text.text_files import checked_chunks, decoded
from hybridnorm_jax.errors import DataError
from hybridnorm_jax.file_formats import START_BYTES, TAR, Format, format_of


def rows_of(path: Place, text_field: str, others: Sequence[str] = ()) -> Iterator[RecordRow] | None:
    """The rows of a file of records; None: it is plain text.

    JSON, TFRecord and ArrayRecord are known by their names, the other formats by their content, unless the name says
    that it is text.

    Args:
      path: of a file that can be opened on this machine.
      text_field: the field with the text.
      others: further fields that are needed.

    Raises:
      DataError: on reading: the file or a record is not what it should be.
      MissingExtraError: on reading: a package is missing that reads the format.
    """
    name = plain_name(path.name)
    if name.endswith(RECORD_SUFFIXES):
        return _json_rows(path, text_field)
    if name.endswith(PLAIN_SUFFIXES):
        return None
    if (kind := record_format(name)) is not None:
        return _example_rows(path, kind)
    form = _format(path)
    if form in TABLES:
        if is_packed(path):
            raise DataError(f"{path}: {form.name} that is packed once more; unpack it, and name the unpacked file")
        return table_rows(path, form, [text_field, *others])
    if form is TAR:
        return _tar_rows(path, text_field)
    if name.endswith((*TABLE_SUFFIXES, *TAR_SUFFIXES)):
        found = f"it is {form.name}" if form else "it does not begin like one"
        raise DataError(f"{path}: its name says {_promised(name)}, but {found}; it is damaged, or has a wrong name")
    return None


def _format(path: Place) -> Format | None:
    """The format of a file's content, after it is unpacked."""
    start = b""
    for chunk in chunks(path):
        start += chunk
        if len(start) >= START_BYTES:
            break
    return format_of(start[: 4 * START_BYTES])


def _promised(name: str) -> str:
    if name.endswith(TAR_SUFFIXES):
        return "a tar archive"
    return "a Parquet file" if name.endswith(".parquet") else "an Arrow file"


def _json_rows(path: Place, text_field: str) -> Iterator[RecordRow]:
    for record in records(str(path), checked_chunks(path)):
        # A long record is there once: not decoded beside its fields, and not beside the next one.
        fields = record_fields(decoded(record.json, path, record.offset), record.place, text_field)
        row = RecordRow(fields, record.place)
        del record, fields
        yield row
        del row


def _example_rows(path: Place, kind: str) -> Iterator[RecordRow]:
    found = tfrecord_records(path, chunks(path)) if kind == "tfrecord" else array_record_records(path)
    for record in found:
        yield RecordRow(example_fields(record), record.place)


def _tar_rows(path: Place, text_field: str) -> Iterator[RecordRow]:
    for member in members(path, chunks(path)):
        place = f"{path}: member {member.key}"
        fields: dict[str, object] = {}
        if member.json is not None:
            fields = record_fields(decoded(member.json, f"{place}.json", 0), f"{place}.json", text_field)
        if member.text is not None:
            fields[text_field] = decoded(member.text, f"{place}.txt", 0)
        yield RecordRow(fields, place)
