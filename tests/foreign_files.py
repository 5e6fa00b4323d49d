"""The beginnings of files of many formats, as their own programs write them: name -> (content, what it is called)."""

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import zstandard

TEXT = b"Some text of a corpus.\n" * 400
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return stream.getvalue()


def _sqlite() -> bytes:
    database = sqlite3.connect(":memory:")
    database.execute("create table texts (text)")
    return database.serialize()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, np.arange(100))
    return stream.getvalue()


IDS = np.arange(5000, dtype=np.uint16)
PACKED = {
    "gzip": (gzip.compress(TEXT), "packed with gzip"),
    "zstd": (zstandard.compress(TEXT), "packed with zstd"),
    "bzip2": (bz2.compress(TEXT), "packed with bzip2"),
    "xz": (lzma.compress(TEXT), "packed with xz"),
}
# Formats that nothing here unpacks. Those of which Python has no writer begin as their specifications say.
FOREIGN = {
    "tar": (tar(), "a tar archive"),
    "zip": (_zip(), "a zip archive"),
    "npz": (_npz(), "a zip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(range(256)), "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(range(256)), "a RAR archive"),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(range(256)), "packed with lz4"),
    "Z": (b"\x1f\x9d\x90" + bytes(range(256)), "packed with compress"),
    "lzma": (lzma.compress(TEXT, format=lzma.FORMAT_ALONE), "packed with lzma"),
    "lzma of preset 9": (lzma.compress(TEXT, format=lzma.FORMAT_ALONE, preset=9), "packed with lzma"),
    "lzip": (b"LZIP\x01\x0c" + bytes(range(256)), "packed with lzip"),
    "parquet": (b"PAR1\x15\x04\x15\x10" + TEXT, "a Parquet file"),
    "arrow": (b"ARROW1\x00\x00\xff\xff\xff\xff" + TEXT, "an Arrow file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00" + bytes(100), "an HDF5 file"),
    "sqlite": (_sqlite(), "an SQLite database"),
    "pickle of a list": (pickle.dumps(IDS.tolist()), "a pickle"),
    "pickle of an array": (pickle.dumps(IDS), "a pickle"),
    "old pickle of a list": (pickle.dumps(IDS.tolist(), protocol=2), "a pickle"),
    "old pickle of an array": (pickle.dumps(IDS, protocol=3), "a pickle"),
    "ASCII pickle": (pickle.dumps(IDS.tolist(), protocol=0), "a pickle"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + TEXT, "a PDF file"),
}
