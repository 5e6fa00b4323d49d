"""Hugging Face directories, and checkpoints of a run, that are damaged."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.malformed.case import Case
from tests.malformed.data_cases import PLACES
from tests.malformed.templates import GOLDENS


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
