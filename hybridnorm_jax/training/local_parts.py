"""What one process keeps of a step on the disk of its own host: its parts of all arrays, with digests.

STEP-ATTEMPT/P-of-N/arrays.bin holds the bytes of one block after the other, index.json what each is. A block is a
rectangle of an array that lay on one device. The directory appears under its name when all of it is written. Nothing
here knows of other processes; local_checkpoints.py puts their parts together.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ARRAYS, INDEX = "arrays.bin", "index.json"
PARTIAL = ".partial"


class Block(NamedTuple):
    """A rectangle of an array: in each dimension from `start` to before `stop`."""

    leaf: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    def overlap(self, other: "Block") -> "Block | None":
        """What both have of the same array; None: nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if self.leaf != other.leaf or any(first >= last for first, last in zip(start, stop, strict=True)):
            return None
        return Block(self.leaf, start, stop)

    def within(self, outer: "Block") -> tuple[slice, ...]:
        """Where it lies in a block around it."""
        return tuple(
            slice(first - origin, last - origin)
            for first, last, origin in zip(self.start, self.stop, outer.start, strict=True)
        )


class Part(NamedTuple):
    """What was kept of a step.

    Attributes:
      facts: what was said besides the arrays; JSON.
      leaves: name -> (shape, dtype) of every whole array.
      blocks: what is there and undamaged.
      damaged: a line for each block that is not as it was written.
    """

    facts: dict[str, Any]
    leaves: dict[str, tuple[tuple[int, ...], str]]
    blocks: dict[Block, np.ndarray]
    damaged: list[str]


def write_part(folder: Path, blocks: Mapping[Block, np.ndarray], leaves: Mapping[str, Any], facts: Any) -> None:
    """Write a part, whole or not at all, over one of the same name.

    Args:
      folder: of the part; its parents are made.
      leaves: name -> anything with shape and dtype, of the whole arrays.

    Raises:
      OSError: no room, no right, ...
    """
    partial = folder.with_name(f"{folder.name}{PARTIAL}-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        entries = []
        with (partial / ARRAYS).open("wb") as stream:
            for block, array in blocks.items():
                data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
                entries.append([*block, stream.tell(), data.nbytes, hashlib.sha256(data).hexdigest()])
                stream.write(data)
            _flush(stream)
        shapes = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
        content = {"facts": facts, "leaves": shapes, "blocks": entries}
        text = json.dumps(content)
        with (partial / INDEX).open("w") as stream:
            stream.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
            _flush(stream)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_part(folder: Path) -> Part:
    """Read a part; every block is compared with its digest.

    Raises:
      OSError, ValueError: the index is not there, or not as it was written.
    """
    digest, _, text = (folder / INDEX).read_text().partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{INDEX} is not as it was written")
    content = json.loads(text)
    leaves = {name: (tuple(shape), dtype) for name, (shape, dtype) in content["leaves"].items()}
    blocks, damaged = {}, []
    with (folder / ARRAYS).open("rb") as stream:
        for leaf, start, stop, offset, size, sha256 in content["blocks"]:
            stream.seek(offset)
            data = stream.read(size)
            block = Block(leaf, tuple(start), tuple(stop))
            if hashlib.sha256(data).hexdigest() != sha256:
                damaged.append(f"{folder}: {leaf} is not as it was written")
                continue
            blocks[block] = np.frombuffer(data, np.dtype(leaves[leaf][1])).reshape(block.shape)
    return Part(content["facts"], leaves, blocks, damaged)


def _flush(stream: Any) -> None:
    """What is written survives the machine."""
    stream.flush()
    os.fsync(stream.fileno())
