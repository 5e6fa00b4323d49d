"""Rows of Parquet and Arrow files, read in small batches of the columns that are asked for.

pyarrow reads them; it belongs to the extra `parquet`. An Arrow file may be of either kind: with an index at its end
(as Feather's second version), or a stream, as Hugging Face's `datasets` writes its shards.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.data.text.record_rows import RecordRow, shown_names
from hybridnorm_jax.data.text.records import MOST_RECORD_BYTES
from hybridnorm_jax.errors import DataError, MissingExtraError, first_line
from hybridnorm_jax.file_formats import ARROW_FILE, ARROW_STREAM, PARQUET, Format

TABLES = (PARQUET, ARROW_FILE, ARROW_STREAM)
# Rows of one batch of Parquet: as many as hold about so many bytes, by the mean of their row group. They are few:
# one text may stand in a file once and in all of its rows.
BATCH_BYTES = 4 << 20
MOST_ROWS = 16
# A column is read from the disk through a buffer of this size, not a row group at once.
BUFFER_BYTES = 1 << 20


def table_rows(path: Place, form: Format, columns: Sequence[str]) -> Iterator[RecordRow]:
    """The rows of a Parquet or Arrow file, with the columns that the fields are in.

    Args:
      path: of a regular file.
      form: one of TABLES.
      columns: names of fields, as field_value reads them.

    Raises:
      DataError: it is damaged, or has no such column.
      MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError(f"{path}: {form.name}", "parquet") from error
    read = {PARQUET: _parquet_batches, ARROW_FILE: _arrow_file_batches, ARROW_STREAM: _arrow_stream_batches}[form]
    number = 0
    try:
        for batch in read(path, columns):
            for fields in batch.to_pylist():
                number += 1
                yield RecordRow(fields, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {form.name} that is damaged or truncated ({first_line(error)})") from error
    except MemoryError as error:
        raise DataError(f"{path}: one batch of its rows needs more memory than there is") from error


def _parquet_batches(path: Place, columns: Sequence[str]) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(readable(path), buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        wanted = _wanted(path, file.schema_arrow.names, columns)
        for group in range(file.metadata.num_row_groups):
            rows = _batch_rows(file.metadata.row_group(group), wanted)
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=wanted, use_threads=False):
                if batch.nbytes > MOST_RECORD_BYTES * rows:
                    raise DataError(f"{path}: a row of more than {MOST_RECORD_BYTES >> 20} MiB, which none may have")
                yield batch


def _batch_rows(group: Any, wanted: Sequence[str]) -> int:
    """How many rows of a row group about BATCH_BYTES hold."""
    parts = [group.column(index) for index in range(group.num_columns)]
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in wanted)
    return min(max(BATCH_BYTES * group.num_rows // max(size, 1), 1), MOST_ROWS)


def _arrow_file_batches(path: Place, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(os.fspath(readable(path))) as source, pyarrow.ipc.open_file(source) as file:
        wanted = _wanted(path, file.schema.names, columns)
        for number in range(file.num_record_batches):
            yield from _slices(file.get_batch(number).select(wanted))


def _arrow_stream_batches(path: Place, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(os.fspath(readable(path))) as source, pyarrow.ipc.open_stream(source) as file:
        wanted = _wanted(path, file.schema.names, columns)
        for batch in file:
            yield from _slices(batch.select(wanted))


def _slices(batch: Any) -> Iterator[Any]:
    batch.validate()
    for start in range(0, batch.num_rows, MOST_ROWS):
        yield batch.slice(start, MOST_ROWS)


def _wanted(path: Place, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The table's columns that hold the fields, each once."""
    found: dict[str, None] = {}
    for field in columns:
        column = field if field in names else field.partition(".")[0]
        if column not in names:
            raise DataError(f"{path}: no column {field!r}; it has: {shown_names(list(names))}")
        found[column] = None
    return list(found)
