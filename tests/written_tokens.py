"""Files of token ids in the formats of other programs, written byte by byte as their documentation says."""

import struct

import numpy as np
from etils import epath

CODES = {"u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def megatron(folder, documents, dtype="<i4", *, name="a", code=None, modes=b""):
    """Documents, each a list of sequences of ids, as Megatron's indexed dataset; returns the path of the .bin file."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    dtype = np.dtype(dtype)
    begins = ((np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize).astype("<i8")
    marks = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    header = struct.pack(
        "<9sQBQQ", b"MMIDIDX\x00\x00", 1, code or CODES[dtype.str.lstrip("|")], len(lengths), len(marks)
    )
    (folder / f"{name}.idx").write_bytes(header + lengths.tobytes() + begins.tobytes() + marks.tobytes() + modes)
    path = folder / f"{name}.bin"
    path.write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    return epath.Path(path)


def varint(number):
    out = bytearray()
    number &= (1 << 64) - 1
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(value):
    if isinstance(value, str | bytes):
        return field(1, field(1, value.encode() if isinstance(value, str) else value))
    if isinstance(value, float):
        return field(2, field(1, struct.pack("<f", value)))
    return field(3, field(1, b"".join(varint(one) for one in value)))


def example(**features):
    entries = [field(1, field(1, name.encode()) + field(2, feature(value))) for name, value in features.items()]
    return field(1, b"".join(entries))


def crc32c(content):
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tfrecord(records):
    def checksum(content):
        crc = crc32c(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    parts = []
    for record in records:
        length = struct.pack("<Q", len(record))
        parts += [length, checksum(length), record, checksum(record)]
    return b"".join(parts)
