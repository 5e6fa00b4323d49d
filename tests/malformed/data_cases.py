"""Data and tokenizers that are damaged, and what stands in the place of a file."""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from tests.malformed.case import Case

LINE = b'{"text": "A document."}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


# Files of other formats, wherever one of ours is read.
OTHERS = {
    "a pointer of git-lfs": POINTER,
    "a tar": _tar(),
    "a 7z": b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(range(256)),
    "lz4": b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(range(256)),
    "a pickle": pickle.dumps(list(range(1000))),
    "Parquet": b"PAR1\x15\x04\x15\x10" + bytes(range(256)) * 4,
}


def _npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def _npy_header(text: str, data: bytes = b"\0" * 64, version: bytes = b"\x01\x00") -> bytes:
    header = text.encode("latin-1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + data


GOOD_NPY = _npy(np.arange(4000, dtype=np.uint16) % 257)
NPY = {
    "empty": b"",
    "no NumPy file": b"hello, world" * 10,
    "cut": GOOD_NPY[:-100],
    "cut in the header": GOOD_NPY[:40],
    "more than it says": GOOD_NPY + GOOD_NPY,
    "floats": _npy(np.ones(100, np.float32)),
    "int8": _npy(np.ones(100, np.int8)),
    "negative": _npy(np.full(1000, -1, np.int32)),
    "ids beyond the vocabulary": _npy(np.full(1000, 60000, np.uint16)),
    "two dimensions": _npy(np.ones((10, 10), np.uint16)),
    "no dimension": _npy(np.array(3, np.uint16)),
    "no token": _npy(np.ones(0, np.uint16)),
    "one token": _npy(np.ones(1, np.uint16)),
    "objects": _npy(np.array([{}, 1], object), allow_pickle=True),
    "texts": _npy(np.array(["a", "b"])),
    "records": _npy(np.zeros(10, [("a", np.uint16)])),
    "big endian": _npy(np.ones(1000, ">u4") * 70000),
    "a huge shape": _npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (999999999999999,), }\n"),
    "a shape beyond 64 bits": _npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (" + "9" * 60 + ",), }\n"),
    "a negative shape": _npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }\n"),
    "a header that is code": _npy_header("__import__('os').system('touch ran')\n"),
    "a header that is deep": _npy_header("(" * 5000 + ")" * 5000),
    "a header of 4 GB": _npy_header("{}", version=b"\x02\x00")[:8] + b"\xff\xff\xff\xff{}",
    "a version of the future": _npy_header("{}", version=b"\x09\x00"),
    "a dtype of no kind": _npy_header("{'descr': '<z9', 'fortran_order': False, 'shape': (1,), }\n"),
    "a zip": b"PK\x03\x04" + b"\0" * 100,
}
BIN = {
    "empty": b"",
    "an odd size": b"\1" * 1001,
    "ids beyond": b"\xff" * 1000,
    "one byte": b"\0",
    "text": b"some text " * 99,
    "floats": np.arange(1000, dtype=np.float32).tobytes(),
    "big endian": np.arange(1000, dtype=">u4").tobytes(),
    "an llm.c header that is cut": struct.pack("<3i", 20240520, 1, 1000),
    **OTHERS,
}
JSONL = {
    "empty": b"",
    "blank": b"\n\n\n",
    "no JSON": LINE + b"hello\n",
    "cut": LINE * 3 + b'{"text": "A docu',
    "no field": LINE + b'{"content": "x"}\n',
    "a number": LINE + b'{"text": 3}\n',
    "null": LINE + b'{"text": null}\n',
    "a list": LINE + b'["text"]\n',
    "an empty list": LINE + b"[]\n",
    "a list in the field": LINE + b'{"text": ["a"]}\n',
    "deep": LINE + b'{"text": "a", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "deep maps": LINE + b'{"text": "a", "meta": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_000 + b"}\n",
    "a number of 5,000 digits": LINE + b'{"text": "a", "meta": ' + b"9" * 5000 + b"}\n",
    "latin-1": LINE + '{"text": "\xe9t\xe9"}\n'.encode("latin-1"),
    "UTF-16": LINE.decode().encode("utf-16"),
    "a lone surrogate": LINE + b'{"text": "\\ud800"}\n',
    "NUL": LINE + b"\0" * 100,
    "a comma": LINE + b'{"text": "a",}\n',
    "NaN": LINE + b'{"text": NaN}\n',
    "brackets that do not match": LINE + b'{"meta": ' + b"[" * 2000 + b"}" * 2000 + b', "text": "a"}\n',
    "a number alone": b"9" * 5000 + b"\n",
    **OTHERS,
    "a line of 50 MB": b'{"text": "' + b"a" * 50_000_000,
}
# Right, or so nearly that it may be read.
SHORT = ("one token", "no token", "one byte", "one word", "a bomb", "a number of 5,000 digits", "deep", "deep maps")
JSONL_MAYBE = ("deep", "deep maps", "a number of 5,000 digits", "a lone surrogate")
TEXT = {
    "empty": b"",
    "blank": b"\n \n\n",
    "latin-1": "caf\xe9 ".encode("latin-1") * 100,
    "UTF-16": ("some text " * 100).encode("utf-16"),
    "binary": bytes(range(256)) * 100,
    "a surrogate": b"text \xed\xa0\x80 " * 100,
    "one word": b"word",
    "a zero byte": b"some text\n" * 50 + b"\0" + b"some text\n" * 50,
    **OTHERS,
}


def _gzip_bomb() -> bytes:
    return gzip.compress(bytes(200_000_000), compresslevel=1)


def _zst_bomb() -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(500_000_000))


GOOD_GZ = gzip.compress(LINE * 200)
GZ = {
    "empty": b"",
    "no gzip": b"hello" * 100,
    "cut": GOOD_GZ[:-20],
    "no end": GOOD_GZ[:-8],
    "a wrong sum": GOOD_GZ[:-8] + b"\0" * 8,
    "rubbish behind": GOOD_GZ + b"rubbish",
    "only a header": GOOD_GZ[:10],
    "a tar inside": gzip.compress(_tar()),
    "packed twice": gzip.compress(GOOD_GZ),
    "a pointer of git-lfs": POINTER,
    "flipped": GOOD_GZ[:30] + bytes([GOOD_GZ[30] ^ 0xFF]) + GOOD_GZ[31:],
}
GOOD_ZST = zstandard.ZstdCompressor(write_checksum=True).compress(LINE * 200)
ZST = {
    "empty": b"",
    "no zstd": b"hello" * 100,
    "cut": GOOD_ZST[:-10],
    "only a header": GOOD_ZST[:6],
    "a wrong sum": GOOD_ZST[:-4] + b"\0" * 4,
    "rubbish behind": GOOD_ZST + b"rubbish",
    "flipped": GOOD_ZST[:20] + bytes([GOOD_ZST[20] ^ 0xFF]) + GOOD_ZST[21:],
}


def data_cases(rng: random.Random) -> Iterator[Case]:
    """Each damaged file as data.files."""
    sets = (
        ("npy", NPY, "tokens", ("big endian", "int8")),
        ("bin", BIN, "tokens", ("text",)),
        ("jsonl", JSONL, "text", JSONL_MAYBE),
        ("json", JSONL, "text", JSONL_MAYBE),
        ("txt", TEXT, "text", ()),
        ("txt.gz", {"latin-1 inside": gzip.compress(TEXT["latin-1"]), **GZ}, "text", ("rubbish behind",)),
        ("jsonl.gz", GZ, "text", ("rubbish behind",)),
        ("txt.zst", ZST, "text", ("rubbish behind",)),
        ("jsonl.zst", ZST, "text", ("rubbish behind",)),
    )
    for suffix, files, source, maybe in sets:
        for fault, content in files.items():
            yield _data(suffix, fault, source, content, refused=fault not in maybe)
    for suffix, bomb in (
        ("txt.gz", _gzip_bomb),
        ("jsonl.gz", _gzip_bomb),
        ("txt.zst", _zst_bomb),
        ("jsonl.zst", _zst_bomb),
    ):
        yield _data(suffix, "a bomb", "text", None, write=bomb, refused=False)
    for suffix, source in (
        ("npy", "tokens"),
        ("bin", "tokens"),
        ("jsonl", "text"),
        ("txt", "text"),
        ("txt.gz", "text"),
    ):
        for fault, prepare in PLACES.items():
            name = f"bad.{suffix}"
            arguments = ("train", "tiny.yaml", f"data.source={source}", f"data.files=[{name}]")
            make = at(name, prepare)
            yield Case(f"data .{suffix}: {fault}", arguments, (name, "data.files"), prepare=make)


def _data(suffix: str, fault: str, source: str, content: bytes | None, *, refused: bool, write=None) -> Case:
    name = f"bad.{suffix}"
    arguments = ("train", "tiny.yaml", f"data.source={source}", f"data.files=[{name}]")
    files = {} if content is None else {name: content}
    names = (name, "data.files", "data.validation_fraction") if fault in SHORT else (name, "data.files")
    prepare = None if write is None else (lambda cwd: (cwd / name).write_bytes(write()))
    return Case(f"data .{suffix}: {fault}", arguments, names, files, prepare, refused=refused)


PLACES: dict[str, Callable[[Path], None]] = {
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "without end": lambda path: path.symlink_to("/dev/zero"),
}


def at(name: str, prepare: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda cwd: prepare(cwd / name)


def tokenizer_cases(rng: random.Random) -> Iterator[Case]:
    """Each wrong tokenizer.json."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    good = {"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "model": model}
    files = {
        "empty": b"",
        "no JSON": b"hello",
        "a list": b"[]",
        "an empty object": b"{}",
        "cut": json.dumps(good).encode()[:-10],
        "no model": json.dumps({**good, "model": None}).encode(),
        "a model of no kind": json.dumps({**good, "model": {"type": "X"}}).encode(),
        "a wrong vocabulary": json.dumps({**good, "model": {**model, "vocab": 3}}).encode(),
        "a negative id": json.dumps({**good, "model": {**model, "vocab": {"a": -1}}}).encode(),
        "a huge id": json.dumps({**good, "model": {**model, "vocab": {"a": 2**31, "b": 1}}}).encode(),
        "an id beyond": json.dumps({**good, "model": {**model, "vocab": {"a": 0, "b": 2**40}}}).encode(),
        "a wrong merge": json.dumps({**good, "model": {**model, "merges": ["x y"]}}).encode(),
        "no separator": json.dumps(good).encode(),
        "a wrong token": json.dumps({**good, "added_tokens": [3]}).encode(),
        "a wrong regex": json.dumps({**good, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}).encode(),
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "deep inside": json.dumps(good).encode()[:-1] + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "a long number": json.dumps(good).encode()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "latin-1": '{"a": "\xe9"}'.encode("latin-1"),
        "NUL": b"\0" * 100,
        **OTHERS,
    }
    for fault, content in files.items():
        arguments = ("train", "tiny.yaml", "data.tokenizer=bad/tokenizer.json")
        names = ("bad/tokenizer.json", "data.separator")
        yield Case(f"tokenizer: {fault}", arguments, names, {"bad/tokenizer.json": content})
    for fault, prepare in PLACES.items():
        arguments = ("train", "tiny.yaml", "data.tokenizer=tokenizer.json")
        yield Case(f"tokenizer: {fault}", arguments, ("tokenizer.json",), prepare=at("tokenizer.json", prepare))
