"""Data, tokenizers, plugins, Hugging Face directories and checkpoints that are damaged."""

import gzip
import io
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from tests.malformed.case import Case
from tests.malformed.templates import GOLDENS

LINE = b'{"text": "A document."}\n'


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
        ("npy", NPY, "tokens", ("big endian",)),
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
            make = _at(name, prepare)
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


def _at(name: str, prepare: Callable[[Path], None]) -> Callable[[Path], None]:
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
    }
    for fault, content in files.items():
        arguments = ("train", "tiny.yaml", "data.tokenizer=bad/tokenizer.json")
        names = ("bad/tokenizer.json", "data.separator")
        yield Case(f"tokenizer: {fault}", arguments, names, {"bad/tokenizer.json": content})
    for fault, prepare in PLACES.items():
        arguments = ("train", "tiny.yaml", "data.tokenizer=tokenizer.json")
        yield Case(f"tokenizer: {fault}", arguments, ("tokenizer.json",), prepare=_at("tokenizer.json", prepare))


SCHEME = """import hybridnorm_jax as hn
half = hn.SublayerPlacement(pre=True{})
@hn.scheme('mine')
def mine(layer, n):
    {}
"""
PLUGINS = {
    "no Python": b"def",
    "a tab and spaces": b"if 1:\n\tx = 1\n        y = 2\n",
    "raises": b"1 / 0",
    "raises two lines": b"raise ValueError('one\\ntwo\\r\\nthree')",
    "raises nothing": b"raise ValueError",
    "raises a long text": b"raise ValueError('x' * 10**6)",
    "raises with an object's text that fails": b"class E(Exception):\n  def __str__(self): raise E\nraise E\n",
    "exits": b"import sys; sys.exit(0)",
    "exits with a text": b"raise SystemExit('done')",
    "exits with 7": b"raise SystemExit(7)",
    "raises BaseException": b"raise BaseException('x')",
    "raises GeneratorExit": b"raise GeneratorExit",
    "recurses": b"def f(): f()\nf()",
    "no module": b"import no_such_module_anywhere",
    "no name": b"from os import no_such_name",
    "NUL": b"x = 1\0",
    "latin-1": "x = '\xe9'".encode("latin-1"),
    "an encoding of no kind": b"# coding: nothing\nx = 1",
    "deep": b"(" * 5000 + b")" * 5000,
    "a long number": b"x = " + b"9" * 5000,
    "a name that exists": b"import hybridnorm_jax as hn\nhn.scheme('pre')(lambda layer, n: None)",
    "an unknown argument": b"import hybridnorm_jax as hn\n@hn.scheme('mine', nothing=1)\ndef f(layer, n): pass",
    "returns nothing": SCHEME.format("", "pass").encode(),
    "returns another thing": SCHEME.format("", "return half").encode(),
    "a scheme raises": SCHEME.format("", "1 / 0").encode(),
    "a scheme raises two lines": SCHEME.format("", "raise ValueError('a\\nb')").encode(),
    "a scheme takes one argument": SCHEME.format("", "return hn.BlockPlacement(half, half)")
    .replace(", n", "")
    .encode(),
    "an infinite scale": SCHEME.format(
        ", residual_scale=float('inf')", "return hn.BlockPlacement(half, half)"
    ).encode(),
    "a scale that is no number": SCHEME.format(
        ", branch_scale=float('nan')", "return hn.BlockPlacement(half, half)"
    ).encode(),
    "a scale of text": SCHEME.format(", input_scale='1'", "return hn.BlockPlacement(half, half)").encode(),
    "an infinite start": SCHEME.format(
        ", branch=True, branch_norm_init=1e999", "return hn.BlockPlacement(half, half)"
    ).encode(),
    "a wrong residual": SCHEME.format(", residual='x'", "return hn.BlockPlacement(half, half)").encode(),
    "a list as residual": SCHEME.format(", residual=[]", "return hn.BlockPlacement(half, half)").encode(),
    "no initializer": SCHEME.replace("'mine'", "'mine', initializer='x'")
    .format("", "return hn.BlockPlacement(half, half)")
    .encode(),
}


def plugin_cases(rng: random.Random) -> Iterator[Case]:
    """Each wrong plugin, for the commands that import some."""
    for fault, content in PLUGINS.items():
        for command in (("train", "tiny.yaml"), ("plan", "tiny.yaml", "--topology=gpu:1x80GB")):
            arguments = (*command, "run.plugins=[bad.py]", "model.scheme=mine")
            yield Case(f"plugin: {fault}", arguments, ("bad.py", "mine", "model.scheme"), {"bad.py": content})
    for fault, prepare in PLACES.items():
        arguments = ("train", "tiny.yaml", "run.plugins=[bad.py]")
        yield Case(f"plugin: {fault}", arguments, ("bad.py",), prepare=_at("bad.py", prepare))
    for plugin in (
        "nowhere.py",
        "no_such_module",
        "a.b.c",
        "''",
        "..",
        "a b",
        "'.py'",
        "__main__x",
        "json.nothing",
        "'a\\0b.py'",
    ):
        arguments = ("train", "tiny.yaml", f'run.plugins=["{plugin}"]' if "\\" in plugin else f"run.plugins=[{plugin}]")
        yield Case("plugin: no such", arguments, ("run.plugins",))


def huggingface_cases(rng: random.Random) -> Iterator[Case]:
    """config.json with every key wrong, and damaged safetensors."""
    for base in ("hf_llama", "hf_gpt2", "hf_olmoe"):
        config = json.loads((GOLDENS / base / "config.json").read_text())
        for key in config:
            for value in (None, "x", -1, 0, 2**70, 1e300, float("nan"), [1], {"a": 1}, True):
                text = json.dumps({**config, key: value}).encode()
                yield _converted(
                    base, f"config.json: {type(value).__name__}", {"model/config.json": text}, refused=False
                )
            text = json.dumps({name: value for name, value in config.items() if name != key}).encode()
            yield _converted(base, "config.json: a key is missing", {"model/config.json": text}, refused=False)
    texts = {
        "empty": b"",
        "no JSON": b"hello",
        "a list": b"[]",
        "an empty object": b"{}",
        "null": b"null",
        "cut": b'{"model_type": "llama"',
        "deep": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        "a long number": b'{"model_type": "llama", "a": ' + b"9" * 5000 + b"}",
        "NUL": b"\0" * 10,
        "latin-1": b'{"a": "\xe9"}',
        "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    }
    for fault, content in texts.items():
        yield _converted("hf_llama", f"config.json: {fault}", {"model/config.json": content}, refused=True)
    yield from _safetensors(rng)


def _converted(base: str, fault: str, files: dict[str, bytes], *, refused: bool = True, prepare=None) -> Case:
    arguments = ("convert", "model", "out", "--form=pre_rmsnorm")
    names = ("model/", "model:", *(name.removeprefix("model/") for name in files))
    return Case(fault, arguments, names, files, prepare, base=base, refused=refused)


def _safetensors(rng: random.Random) -> Iterator[Case]:
    good = (GOLDENS / "hf_llama" / "model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    data = good[8 + length :]
    first = next(name for name in header if name != "__metadata__")

    def packed(changed: object) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data

    def entry(**changes: object) -> bytes:
        return packed({**header, first: {**header[first], **changes}})

    files = {
        "empty": b"",
        "seven bytes": good[:7],
        "cut in the header": good[:100],
        "cut in the data": good[:-1000],
        "a header of 2^60 bytes": (2**60).to_bytes(8, "little") + good[8:],
        "a header of 2^64 bytes": b"\xff" * 8 + good[8:],
        "a header of no length": b"\0" * 8 + good[8:],
        "a header that is no JSON": good[:8] + b"x" * length + data,
        "a header that is a list": packed([]),
        "a header that is deep": (200_000).to_bytes(8, "little") + b"[" * 200_000 + data,
        "an empty header": packed({}),
        "a dtype of no kind": entry(dtype="X9"),
        "a negative shape": entry(shape=[-1, 4]),
        "a huge shape": entry(shape=[2**40, 2**40]),
        "a shape of text": entry(shape="x"),
        "offsets beyond": entry(data_offsets=[0, 2**50]),
        "offsets that turn back": entry(data_offsets=[100, 0]),
        "offsets of text": entry(data_offsets=["a", "b"]),
        "no offsets": entry(data_offsets=None),
        "rubbish behind": good + b"rubbish" * 100,
        "a pickle": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x05hello\x94.",
    }
    for fault, content in files.items():
        yield _converted("hf_llama", f"safetensors: {fault}", {"model/model.safetensors": content})
    index = "model/model.safetensors.index.json"
    original = json.loads((GOLDENS / "hf_olmo2_bf16_sharded" / "model.safetensors.index.json").read_text())
    name = next(iter(original["weight_map"]))
    indices = {
        "empty": b"",
        "no JSON": b"x",
        "a list": b"[]",
        "no map": b"{}",
        "a map of numbers": json.dumps({"weight_map": dict.fromkeys(original["weight_map"], 3)}).encode(),
        "a list as map": b'{"weight_map": []}',
        "a path outside": json.dumps(
            {"weight_map": {**original["weight_map"], name: "../../text.safetensors"}}
        ).encode(),
        "an absolute path": json.dumps({"weight_map": {**original["weight_map"], name: "/etc/passwd"}}).encode(),
        "a file that is missing": json.dumps(
            {"weight_map": {**original["weight_map"], name: "no.safetensors"}}
        ).encode(),
        "NUL in a name": json.dumps({"weight_map": {**original["weight_map"], name: "a\0b"}}).encode(),
        "deep": b'{"weight_map": ' + b"[" * 100_000,
    }
    for fault, content in indices.items():
        yield _converted("hf_olmo2_bf16_sharded", f"index.json: {fault}", {index: content})
    for fault, prepare in PLACES.items():
        for file in ("model/config.json", "model/model.safetensors"):
            place = lambda cwd, file=file, prepare=prepare: ((cwd / file).unlink(), prepare(cwd / file))  # noqa: E731
            case = _converted("hf_llama", f"{file.removeprefix('model/')}: {fault}", {}, prepare=place)
            yield case


def checkpoint_cases(rng: random.Random) -> Iterator[Case]:
    """Each file of a run's checkpoint flipped, cut, emptied, removed, or another thing in its place."""
    while True:
        for command in (
            ("eval", "runs/saved"),
            ("convert", "runs/saved", "out", "--form=pre_rmsnorm"),
            ("train", "tiny.yaml", "init_from=runs/saved", "run.name=new"),
            ("train", "runs/saved/config.yaml"),
        ):
            fault = rng.choice(list(DAMAGES))
            damage = _damage(fault, rng.random(), rng.random(), rng.randrange(1, 256))
            yield Case(f"checkpoint: {fault}", command, ("saved",), prepare=damage, base="run", refused=False)


def _flip(path: Path, where: float, mask: int) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[int(where * len(content))] ^= mask
        path.write_bytes(bytes(content))


def _cut(path: Path, where: float, mask: int) -> None:
    path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])


def _replace(path: Path, where: float, mask: int) -> None:
    path.unlink()
    path.mkdir()


def _remove_directory(path: Path, where: float, mask: int) -> None:
    shutil.rmtree(path.parent)


DAMAGES: dict[str, Callable[[Path, float, int], None]] = {
    "flipped": _flip,
    "cut": _cut,
    "empty": lambda path, where, mask: path.write_bytes(b""),
    "removed": lambda path, where, mask: path.unlink(),
    "rubbish behind": lambda path, where, mask: path.write_bytes(path.read_bytes() + b"rubbish"),
    "rubbish": lambda path, where, mask: path.write_bytes(bytes(range(256))),
    "a directory": _replace,
    "a folder is removed": _remove_directory,
    "deep JSON": lambda path, where, mask: path.write_bytes(b"[" * 100_000 + b"]" * 100_000),
    "a long number": lambda path, where, mask: path.write_bytes(b"9" * 5000),
    "null": lambda path, where, mask: path.write_bytes(b"null"),
    "a list": lambda path, where, mask: path.write_bytes(b"[]"),
}


def _damage(fault: str, which: float, where: float, mask: int) -> Callable[[Path], None]:
    def damage(cwd: Path) -> None:
        files = sorted(path for path in (cwd / "runs" / "saved").rglob("*") if path.is_file())
        DAMAGES[fault](files[int(which * len(files))], where, mask)

    return damage
