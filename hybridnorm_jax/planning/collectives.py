"""What a compiled program sends between devices, read from XLA's text of it."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shape`, `operands` and `attributes` are text of the line."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def operand_names(self) -> list[str]:
        """The names of the instructions whose values it reads."""
        return _NAME.findall(self.operands)

    def attribute(self, name: str) -> str | None:
        """The name or number after `name=`, without %; None where there is none."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


# Name -> instruction, in the order of the text.
Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A module's computations by their names, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind that one device takes part in, in one step.

    Attributes:
      count: how many there are.
      bytes: of all of them, on one device: for each the larger of what goes in and what comes out, without the padding
        of tiles.
    """

    count: int = 0
    bytes: int = 0


@dataclasses.dataclass
class Collectives:
    """The collectives of one execution.

    Attributes:
      kinds: kind -> its traffic.
      unknown_loops: how many loops with collectives inside were counted as if they ran once.
    """

    kinds: dict[str, Traffic]
    unknown_loops: int


def read_collectives(text: str) -> Collectives:
    """The collectives of one execution of a compiled module.

    A collective in a loop counts as often as the loop runs. Every branch of a conditional counts. An asynchronous
    collective counts once, where it starts, even where the TPU compiler spreads it over several fusions. What that
    compiler calls all-reduce-scatter, an all-reduce of which each device keeps its part, is a reduce-scatter. What goes
    over the slow network between slices, where a slice is one participant, is a kind of its own: "all-reduce between
    slices".

    Args:
      text: of the module after optimization.

    Raises:
      ValueError: it is not the text of a module.
    """
    module = parse_module(text)
    walk = _Walk(module.computations)
    kinds: dict[str, Traffic] = {}
    for sent in walk.collectives(module.entry):
        traffic = kinds.setdefault(sent.kind, Traffic())
        traffic.count += sent.times
        traffic.bytes += sent.bytes * sent.times
    return Collectives(kinds=kinds, unknown_loops=walk.unknown_loops)


def kernels(text: str) -> list[str]:
    """Names of the Pallas kernels in a module compiled for TPU, sorted."""
    names = re.findall(r"%?([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", text)
    return sorted({re.sub(r"(\.\w+)+$", "", name) for name in names})


def parse_module(text: str) -> Module:
    """The module in a text.

    Raises:
      ValueError: it has no entry.
    """
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
    return Module(computations, entry)


def _instruction(line: str, start: re.Match) -> Instruction:
    rest = line[start.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    return Instruction(
        name=start[2],
        shape=shape,
        opcode=opcode,
        operands=rest[1 : end - 1],
        attributes=rest[end:],
        is_root=start[1] is not None,
    )


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


def tuple_elements(shape: str) -> list[str]:
    """The outermost elements of a tuple shape."""
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(shape):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        ends = (letter == "," and depth == 1) or (letter == ")" and depth == 0)
        if ends:
            parts.append(shape[start:position])
            start = position + 1
    return parts


class _Sent(NamedTuple):
    """A collective that runs several times in one call of a computation.

    Attributes:
      bytes: of each time.
    """

    kind: str
    bytes: int
    times: int


class _Walk:
    """Follows a module from a computation to those it calls."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self.unknown_loops = 0
        self._known: dict[str, list[_Sent]] = {}

    def collectives(self, name: str) -> list[_Sent]:
        """Everything that one call of this computation sends."""
        if name not in self._known:
            self._known[name] = list(self._find_collectives(name))
        return self._known[name]

    def _find_collectives(self, name: str) -> Iterator[_Sent]:
        instructions = self.computations[name].values()
        if _continues(name, instructions):
            return
        for instruction in instructions:
            kind = _kind(instruction, name)
            if kind is not None:
                yield _Sent(kind, bytes=self._message_bytes(instruction, name), times=1)
            elif instruction.opcode == "while":
                yield from self._loop(instruction, name)
            else:
                for called in called_computations(instruction):
                    yield from self.collectives(called)

    def _loop(self, loop: Instruction, name: str) -> Iterator[_Sent]:
        body = self.collectives(loop.attribute("body"))
        if not body:
            return
        trips = trip_count(loop, self.computations[name], self.computations)
        if trips is None:
            self.unknown_loops += 1
            trips = 1
        for sent in body:
            yield sent._replace(times=sent.times * trips)

    def _message_bytes(self, instruction: Instruction, computation: str) -> int:
        known = self.computations[computation]
        operands = sum(shape_bytes(known[name].shape) for name in instruction.operand_names if name in known)
        if instruction.opcode == "send":
            return operands
        result = instruction.shape
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            _, result, *_ = tuple_elements(result)  # (operand, result, ...)
        return max(operands, shape_bytes(result))


def _kind(instruction: Instruction, computation: str) -> str | None:
    """The kind of collective that an instruction is; None for every other instruction."""
    if instruction.opcode == "send":
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        return f"{transfer[1].lower().replace('_', '-')} between slices" if transfer else None
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in KINDS else None


def _continues(name: str, instructions: Iterable[Instruction]) -> bool:
    """Whether a fusion continues a collective that another fusion started (its target is AsyncCollectiveStart)."""
    ends = any('"AsyncCollectiveDone"' in instruction.attributes for instruction in instructions)
    return ends or name.startswith("async_collective_fusion")


def called_computations(instruction: Instruction) -> list[str]:
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
    """How often a while loop runs; None where the text does not say.

    Either XLA has written it down, or the condition compares a counter, an element of the carried tuple, with a
    constant, and the counter starts at a constant and grows by a constant.

    Args:
      caller: the computation with the loop.
      computations: all of the module, by name.
    """
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if written:
        return int(written[1])
    condition = computations[loop.attribute("condition")]
    compare = root_of(condition)
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, limit = (condition.get(name) for name in compare.operand_names)
    end = _constant(limit, condition)
    if end is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(counter.attribute("index"))
    carried = caller.get(loop.operand_names[0])
    first = _constant(_element(carried, index, caller), caller)
    step = _increment(index, computations[loop.attribute("body")])
    if first is None or not step:
        return None
    return max(0, math.ceil((end - first) / step))


def _increment(index: int, body: Computation) -> int | None:
    """The constant that a loop adds to this element of the carried tuple; None where it does something else."""
    sum_ = _element(root_of(body), index, body)
    if sum_ is None or sum_.opcode != "add":
        return None
    summands = [_constant(body.get(name), body) for name in sum_.operand_names]
    return next((constant for constant in summands if constant is not None), None)


def root_of(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _element(value: Instruction | None, index: int, computation: Computation) -> Instruction | None:
    """The element of a tuple at this index; None where the value is no tuple of this computation."""
    if value is None or value.opcode != "tuple":
        return None
    return computation.get(value.operand_names[index])


def _constant(value: Instruction | None, computation: Computation) -> int | None:
    """The integer constant that a value is, or copies; None for every other value."""
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
        value = computation.get(value.operand_names[0])
    if value is None or value.opcode != "constant" or not value.operands.lstrip("-").isdigit():
        return None
    return int(value.operands)
