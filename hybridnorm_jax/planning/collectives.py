"""What a compiled program sends between devices, read from XLA's text of it."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shape`, `operands` and `attributes` as they are written."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def operand_names(self) -> list[str]:
        """Of the instructions it reads."""
        return _NAME.findall(self.operands)

    def attribute(self, name: str) -> str | None:
        """The word after `name=`, without %."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind that one device takes part in, in one step.

    Attributes:
      count: how many.
      bytes: of the larger of what goes in and what comes out, on one device, without the padding of tiles.
    """

    count: int = 0
    bytes: int = 0


@dataclasses.dataclass
class Collectives:
    """`kinds`: kind -> Traffic; `unknown_loops`: loops with collectives inside that were counted as if run once."""

    kinds: dict[str, Traffic]
    unknown_loops: int


def read_collectives(text: str) -> Collectives:
    """The collectives of one execution of a compiled module.

    Collectives in a loop count as often as it runs; of a conditional, those of every branch. An asynchronous collective
    is counted once, where it starts, also where the TPU compiler spreads it over several fusions; and what that
    compiler calls all-reduce-scatter, an all-reduce of which each device keeps its part, is a reduce-scatter. What goes
    over the slow network, in which a slice is one participant, is a kind of its own: "all-reduce between slices".
    """
    computations, entry = parse_computations(text)
    walk = _Walk(computations)
    kinds: dict[str, Traffic] = {}
    for kind, size, times in walk.collectives(entry):
        traffic = kinds.setdefault(kind, Traffic())
        traffic.count += times
        traffic.bytes += size * times
    return Collectives(kinds, walk.unknown_loops)


def kernels(text: str) -> list[str]:
    """Names of the Pallas kernels in a module compiled for TPU, sorted."""
    names = re.findall(r"%?([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", text)
    return sorted({re.sub(r"(\.\w+)+$", "", name) for name in names})


def parse_computations(text: str) -> tuple[dict[str, Computation], str]:
    """(name -> instructions in order, name of the entry) of a module's text."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            instruction = _instruction(line, start)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    return computations, entry


def _instruction(line: str, start: re.Match) -> Instruction:
    rest = line[start.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    return Instruction(start[2], shape, opcode, rest[1 : end - 1], rest[end:], bool(start[1]))


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the one at the start."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def shape_bytes(shape: str) -> int:
    """Bytes of an array shape such as bf16[8,128]{1,0:T(8,128)}, or of all arrays of a tuple."""
    total = 0
    for letters, bits, sizes in _ARRAY.findall(shape):
        width = 8 if letters == "pred" else int(bits or 0)
        elements = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        total += math.ceil(elements * width / 8)
    return total


def _elements(shape: str) -> list[str]:
    """The outermost elements of a tuple shape."""
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[start:position])
            start = position + 1
    return parts


class _Walk:
    """Follows a module from a computation to those it calls."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self.unknown_loops = 0
        self.collectives = functools.cache(lambda name: tuple(self._collectives(name)))

    def _collectives(self, name: str) -> Iterator[tuple[str, int, int]]:
        """(kind, bytes, times) of everything that one call of this computation sends."""
        instructions = self.computations[name].values()
        if _goes_on(name, instructions):
            return
        for instruction in instructions:
            kind = _kind(instruction, name)
            if kind is not None:
                yield kind, self._message(instruction, name), 1
            elif instruction.opcode == "while":
                yield from self._repeated(instruction, name)
            else:
                for called in _called(instruction):
                    yield from self.collectives(called)

    def _repeated(self, loop: Instruction, name: str) -> Iterator[tuple[str, int, int]]:
        body = self.collectives(loop.attribute("body"))
        if not body:
            return
        trips = trip_count(loop, self.computations[name], self.computations)
        self.unknown_loops += trips is None
        for kind, size, times in body:
            yield kind, size, times * (1 if trips is None else trips)

    def _message(self, instruction: Instruction, computation: str) -> int:
        known = self.computations[computation]
        operands = sum(shape_bytes(known[name].shape) for name in instruction.operand_names if name in known)
        shape = instruction.shape
        if instruction.opcode == "send":
            return operands
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            shape = _elements(shape)[1]  # (operand, result, ...)
        return max(operands, shape_bytes(shape))


def _kind(instruction: Instruction, computation: str) -> str | None:
    """What is sent; None where nothing is."""
    if instruction.opcode == "send":
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        return between and f"{between[1].lower().replace('_', '-')} between slices"
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in KINDS else None


def _goes_on(name: str, instructions: Iterable[Instruction]) -> bool:
    """Whether a fusion repeats a collective that another one, with the target AsyncCollectiveStart, has started."""
    ends = any('"AsyncCollectiveDone"' in instruction.attributes for instruction in instructions)
    return ends or name.startswith("async_collective_fusion")


def _called(instruction: Instruction) -> list[str]:
    """Computations that a fusion, a call, a conditional or the start of an asynchronous operation runs."""
    match instruction.opcode:
        case "call":
            return [instruction.attribute("to_apply") or instruction.attribute("calls")]
        case "fusion" | "async-start":
            return [instruction.attribute("calls")]
        case "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            if branches:
                return _NAME.findall(branches[1])
            return [instruction.attribute(f"{which}_computation") for which in ("true", "false")]
    return []


def trip_count(loop: Instruction, caller: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a while loop of this caller runs, None where its text does not say.

    Either XLA has written it down, or the condition compares a counter, an element of the carried tuple, with a
    constant, and the counter starts at a constant and grows by a constant.
    """
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if written:
        return int(written[1])
    condition, body = (computations[loop.attribute(name)] for name in ("condition", "body"))
    compare = _root(condition)
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, limit = (condition.get(name) for name in compare.operand_names)
    end = _constant(limit, condition)
    if end is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(counter.attribute("index"))
    first = _constant(_element(caller.get(loop.operand_names[0]), index, caller), caller)
    increment = _element(_root(body), index, body)
    if first is None or increment is None or increment.opcode != "add":
        return None
    steps = [_constant(body.get(name), body) for name in increment.operand_names]
    step = next((step for step in steps if step is not None), None)
    return None if not step else max(0, math.ceil((end - first) / step))


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _element(value: Instruction | None, index: int, computation: Computation) -> Instruction | None:
    """What stands at this index of a tuple."""
    if value is None or value.opcode != "tuple":
        return None
    return computation.get(value.operand_names[index])


def _constant(value: Instruction | None, computation: Computation) -> int | None:
    """The integer that this is or copies."""
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
        value = computation.get(value.operand_names[0])
    if value is None or value.opcode != "constant" or not value.operands.lstrip("-").isdigit():
        return None
    return int(value.operands)
