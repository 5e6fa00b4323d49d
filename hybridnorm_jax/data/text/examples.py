"""Records of TFRecord and ArrayRecord files, and the tf.train.Example that each of them holds. Needs no TensorFlow.

A TFRecord file is, for each record: its length (uint64), a checksum of these 8 bytes (uint32), the record, a checksum
of it (uint32), all little-endian. A checksum is the CRC-32C c of the bytes, as ((c >> 15) | (c << 17)) + 0xa282ead8
modulo 2^32. An ArrayRecord file is read by the package array_record, which Grain brings and which checks its content.

An Example is a map from names of features to lists of bytes, of floats or of integers (protocol buffers).
"""

import functools
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from hybridnorm_jax.data.places.remote_file import Place, readable
from hybridnorm_jax.errors import DataError, MissingExtraError, first_line

NAME = re.compile(r"\.(?P<format>tfrecords?|array_?record)(?:-\d+-of-\d+)?", re.IGNORECASE)
MOST_RECORD_BYTES = 64 << 20
MASK = 0xA282EAD8
# Records of an ArrayRecord file that are read at once.
TOGETHER = 64


class Record(NamedTuple):
    """The bytes of one record, and where it stands (for messages)."""

    content: bytes
    place: str


def record_format(name: str) -> str | None:
    """What a file's name says, such as train.tfrecord-00000-of-00010: "tfrecord", "array_record" or None."""
    match = NAME.search(name)
    if match is None or match.end() != len(name):
        return None
    return "tfrecord" if match["format"].lower().startswith("tf") else "array_record"


def tfrecord_records(path: Place, chunks: Iterable[bytes]) -> Iterator[Record]:
    """The records of a TFRecord file.

    Args:
      path: for messages.
      chunks: its unpacked content.

    Raises:
      DataError: a checksum is wrong, the file ends inside a record, or a record is too long to be meant.
      MissingExtraError: the package that computes checksums is missing.
    """
    buffer = _Buffer(path, chunks)
    number = 0
    while header := buffer.take(12, begins=True):
        number += 1
        place = f"{path}: record {number}"
        length, checksum = struct.unpack("<QI", header)
        if _masked_checksum(header[:8]) != checksum:
            right = "no TFRecord file" if number == 1 else "the file is damaged"
            raise DataError(f"{place}: the checksum of its length is wrong: {right}")
        if length > MOST_RECORD_BYTES:
            raise DataError(f"{place}: has {length:,} bytes, but a record may have {MOST_RECORD_BYTES >> 20} MiB")
        content = buffer.take(length)
        (checksum,) = struct.unpack("<I", buffer.take(4))
        if _masked_checksum(content) != checksum:
            raise DataError(f"{place}: its checksum is wrong: the file is damaged")
        yield Record(content, place)


class _Buffer:
    """Bytes of a file, taken from its begin."""

    def __init__(self, path: Place, chunks: Iterable[bytes]):
        self._path, self._chunks = path, iter(chunks)
        self._content = bytearray()

    def take(self, count: int, *, begins: bool = False) -> bytes:
        """The next bytes; nothing at the end of the file, if a record `begins` there."""
        while len(self._content) < count:
            chunk = next(self._chunks, b"")
            if not chunk:
                if begins and not self._content:
                    return b""
                raise DataError(f"{self._path}: ends inside a record: it is truncated, or no TFRecord file")
            self._content += chunk
        taken = bytes(self._content[:count])
        del self._content[:count]
        return taken


def _masked_checksum(content: bytes) -> int:
    try:
        import google_crc32c
    except ModuleNotFoundError as error:
        raise MissingExtraError("TFRecord files", extra="tfrecord") from error
    checksum = google_crc32c.value(content)
    return ((checksum >> 15 | checksum << 17) + MASK) & 0xFFFFFFFF


def array_record_records(path: Place) -> Iterator[Record]:
    """The records of an ArrayRecord file.

    Raises:
      DataError: it is damaged or no such file.
      MissingExtraError: the package array_record is missing, as on Windows.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: the package array_record, which reads it, is not there for this system") from error
    try:
        reader = ArrayRecordReader(readable(path), "readahead_buffer_size:1M,max_parallelism:1")
        count = reader.num_records()
        if not reader.ok() or not count:
            raise DataError(f"{path}: no ArrayRecord file, or truncated, or without records")
        for start in range(0, count, TOGETHER):
            for number, content in enumerate(reader.read(start, min(start + TOGETHER, count)), start=start + 1):
                yield Record(content, f"{path}: record {number}")
        reader.close()
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({first_line(error)})") from error


def example_fields(record: Record) -> dict[str, Any]:
    """The features of a record that is a tf.train.Example.

    One value stands alone, several are a list. Bytes are text where they are UTF-8.

    Raises:
      DataError: it is no Example.
    """
    message_error, example_class = _example_class()
    try:
        example = example_class.FromString(record.content)
    except message_error as error:
        raise DataError(f"{record.place}: no tf.train.Example; write each record as one") from error
    return {name: _value(feature) for name, feature in example.features.feature.items()}


def _value(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    values = [] if kind is None else list(getattr(feature, kind).value)
    if kind == "bytes_list":
        values = [_text(value) for value in values]
    return values[0] if len(values) == 1 else values


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


@functools.cache
def _example_class() -> tuple[type[Exception], Any]:
    """(the error of bytes that are no message, the class of tf.train.Example), as its .proto file says."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="hybridnorm_jax/example.proto", package="hybridnorm_jax")
    file.syntax = "proto3"
    for name, kind in (("Bytes", kinds.TYPE_BYTES), ("Float", kinds.TYPE_FLOAT), ("Int64", kinds.TYPE_INT64)):
        found = file.message_type.add(name=f"{name}List")
        found.field.add(name="value", number=1, type=kind, label=kinds.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("Bytes", "Float", "Int64"), start=1):
        field = feature.field.add(name=f"{name.lower()}_list", number=number, type=kinds.TYPE_MESSAGE)
        field.label, field.oneof_index, field.type_name = kinds.LABEL_OPTIONAL, 0, f".hybridnorm_jax.{name}List"
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    for owner, name, number, kind, label in (
        (entry, "value", 2, "Feature", kinds.LABEL_OPTIONAL),
        (features, "feature", 1, "Features.FeatureEntry", kinds.LABEL_REPEATED),
        (file.message_type.add(name="Example"), "features", 1, "Features", kinds.LABEL_OPTIONAL),
    ):
        field = owner.field.add(name=name, number=number, type=kinds.TYPE_MESSAGE, label=label)
        field.type_name = f".hybridnorm_jax.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    example = pool.FindMessageTypeByName("hybridnorm_jax.Example")
    return message.DecodeError, message_factory.GetMessageClass(example)
