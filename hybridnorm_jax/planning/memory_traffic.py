"""How many bytes of a device's memory (HBM) a compiled program reads and writes, counted in XLA's text of it."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from hybridnorm_jax.planning.collectives import (
    Computation,
    Instruction,
    Module,
    called_computations,
    parse_module,
    root_of,
    trip_count,
)

# Names for what is there already: nothing is moved.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "reshape",
    "after-all",
    "partition-id",
    "opt-barrier",
    "async-done",
    "copy-done",
    "slice-done",
}
# Of their first operand they read as much as they return.
_PARTIAL_READS = {"dynamic-slice", "slice", "gather"}
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\](?:\{([^{}]*)\})?")


class Moved(NamedTuple):
    """What one instruction moves each time it runs.

    Attributes:
      name: of the instruction.
      bytes: read and written, with the padding of tiles.
      times: how often it runs.
    """

    name: str
    bytes: int
    times: int


def loop_of(module: Module, computation: str | None = None) -> str:
    """The body of the one loop in a computation; in the entry, where none is named.

    Raises:
      ValueError: there is not exactly one.
    """
    name = computation or module.entry
    loops = [each for each in module.computations[name].values() if each.opcode == "while"]
    if len(loops) != 1:
        raise ValueError(f"{name}: {len(loops)} loops, not one")
    return loops[0].attribute("body")


def memory_traffic(text: str, *, of_loop: bool = False, unknown_trips: int = 1) -> list[Moved]:
    """What one execution of a compiled module moves between memory and cores, largest first.

    Every instruction that runs by itself reads its operands from memory and writes its result there; what happens
    inside a fusion stays in registers. A slice is read alone, also inside a fusion, and an update in place is written
    alone. What a TPU keeps in its cores (S(1) in the text) is not counted. No cache is assumed.

    Args:
      text: of the module after optimization.
      of_loop: count one turn of the one loop of its entry instead.
      unknown_trips: how often a loop runs whose text does not say it.
    """
    module = parse_module(text)
    start = loop_of(module) if of_loop else module.entry
    walk = _Walk(module, unknown_trips)
    return sorted(walk.moved(start, 1), key=lambda each: -each.bytes * each.times)


def total_bytes(moved: list[Moved]) -> int:
    """All bytes together."""
    return sum(each.bytes * each.times for each in moved)


def memory_bytes(shape: str) -> int:
    """Bytes of memory that an array, or all arrays of a tuple, take, such as bf16[8,100]{1,0:T(8,128)(2,1)}: 2,048."""
    return sum(_array_bytes(*array) for array in _ARRAY.findall(shape))


def _array_bytes(letters: str, bits: str, sizes: str, layout: str) -> int:
    order, _, tiling = layout.partition(":")
    if re.search(r"S\([1-9]", tiling):
        return 0
    width = 8 if letters == "pred" else int(bits or 0)
    dims = [int(size.lstrip("<=")) for size in sizes.split(",") if size]
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if tile and order:
        minor_first = [int(each) for each in order.split(",")]
        for side, dim in zip(reversed(tile[1].split(",")), minor_first, strict=False):
            dims[dim] = -(-dims[dim] // int(side)) * int(side)
    return math.ceil(math.prod(dims) * width / 8)


class _Walk:
    """Follows a module from a computation to those it runs."""

    def __init__(self, module: Module, unknown_trips: int):
        self.computations = module.computations
        self.unknown_trips = unknown_trips

    def moved(self, name: str, times: int) -> Iterator[Moved]:
        """What `times` calls of this computation move."""
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = trip_count(instruction, computation, self.computations)
                trips = self.unknown_trips if trips is None else trips
                yield from self.moved(instruction.attribute("body"), times * trips)
            elif instruction.opcode in ("call", "conditional"):
                for called in called_computations(instruction):
                    yield from self.moved(called, times)
            elif instruction.opcode not in _FREE:
                yield Moved(instruction.name, self._bytes(instruction, computation), times)

    def _bytes(self, instruction: Instruction, computation: Computation) -> int:
        """What an instruction reads and writes."""
        inside = self._inside(instruction)
        if inside is not None:
            return _fusion_bytes(inside, instruction, computation, self.computations)
        operands = [computation[name].shape for name in instruction.operand_names if name in computation]
        if instruction.opcode in _PARTIAL_READS:
            return 2 * memory_bytes(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * memory_bytes(operands[1])
        if instruction.opcode in ("copy-start", "slice-start"):  # (destination, source, ...): what is moved, once each
            destination = re.match(r"\(*([^{]*\{[^}]*\})", instruction.shape)
            moved = memory_bytes(destination[1]) if destination else 0
            read = memory_bytes(re.sub(r"S\([1-9]\d*\)", "", destination[1])) if destination else 0
            return moved + (read if any(memory_bytes(shape) for shape in operands) else 0)
        return sum(map(memory_bytes, operands)) + memory_bytes(instruction.shape)

    def _inside(self, instruction: Instruction) -> Computation | None:
        if instruction.opcode not in ("fusion", "async-start"):
            return None
        return self.computations[instruction.attribute("calls")]


def _fusion_bytes(
    inside: Computation, fusion: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    operands = [computation[name].shape for name in fusion.operand_names]
    total = 0
    for number, shape in enumerate(operands):
        if memory_bytes(shape):
            total += min(memory_bytes(shape), _read(inside, number, computations))
    if not memory_bytes(fusion.shape):
        return total
    return total + min(memory_bytes(fusion.shape), _written(inside, root_of(inside), computations))
