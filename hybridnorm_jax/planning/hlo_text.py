"""XLA's text of a compiled program (HLO), as JAX 0.10 to 0.12 and libtpu write it, read into named tuples.

What cannot be read is refused in one line, as a count of half a program would look like a count of all of it. How
often an instruction runs is told by executions.py.
"""

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from hybridnorm_jax.errors import UserError

KNOWN = "JAX 0.10 to 0.12"

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"[a-z][\w\-]*$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
# Their parentheses hold no names of instructions.
_WITHOUT_OPERANDS = {
    "parameter",
    "constant",
    "iota",
    "partition-id",
    "replica-id",
    "after-all",
    "rng-get-and-update-state",
}
_CALLERS = {"while", "fusion", "call", "conditional", "async-start"}


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

    @property
    def op_name(self) -> str:
        """What JAX calls the operation that it comes from, a path of named scopes; empty where it does not say."""
        match = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """Of a custom call, the library function or kernel that it runs; empty for every other instruction."""
        match = re.search(r'\bcustom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, name: str) -> str | None:
        """The name or number after `name=`, without %; None where there is none."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match and match[1]

    def numbers(self, name: str) -> list[int]:
        """The whole numbers of `name={1,2}`; none where there is no such attribute."""
        match = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return [int(number) for number in match[1].split(",") if number] if match else []


# Name -> instruction, in the order of the text.
Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A module's computations by their names, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


class Array(NamedTuple):
    """An array shape such as bf16[8,128]{1,0:T(8,128)}: its type, its sizes, and bytes without the padding of tiles."""

    dtype: str
    sizes: tuple[int, ...]
    bytes: int


def parse_module(text: str) -> Module:
    """The module in a text.

    Raises:
      UserError: it is not the text of a module, or is written as no known JAX writes it.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _joined(text):
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif _END.match(line):
            current = None
        elif start := _INSTRUCTION.match(line):
            if current is None:
                refuse(f"an instruction outside of a computation: {line.strip():.80}")
            instruction = _instruction(line, start)
            current[instruction.name] = instruction
    if not entry:
        refuse("no ENTRY computation")
    module = Module({name: _with_elements(each) for name, each in computations.items()}, entry)
    _check(module)
    return module


def refuse(what: str) -> NoReturn:
    """Raise UserError: this text is in no format that is known here.

    Args:
      what: cannot be read, in a few words.
    """
    raise UserError(
        f"the text of the compiled program cannot be read, so nothing in it is counted: {what}; known is the text of "
        f"{KNOWN}, installed is JAX {importlib.metadata.version('jax')}"
    )


def _joined(text: str) -> Iterator[str]:
    """Lines, an instruction that is written over several of them as one."""
    held: str | None = None
    for line in text.splitlines():
        if _COMPUTATION.match(line) or _END.match(line) or _INSTRUCTION.match(line):
            if held is not None:
                yield held
            held = line
            if _END.match(line):
                yield line
                held = None
        elif held is not None:
            held += line
    if held is not None:
        yield held


def _instruction(line: str, start: re.Match) -> Instruction:
    rest = line[start.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, parenthesis, _ = rest.partition("(")
    if not parenthesis or not _OPCODE.match(opcode) or not (shape.startswith("(") or _ARRAY.match(shape)):
        refuse(f"{line.strip():.80}")
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


def _with_elements(computation: Computation) -> Computation:
    """The computation with a get-tuple-element for each %x#0, which is how JAX 0.12 writes an element of a tuple."""
    made: Computation = {}
    for instruction in computation.values():
        if "#" in instruction.operands and instruction.opcode not in _WITHOUT_OPERANDS:
            for name in instruction.operand_names:
                _add_elements(name, made)
        made[instruction.name] = instruction
    return made


def _add_elements(name: str, made: Computation) -> None:
    whole, *indices = name.split("#")
    for index in map(int, indices):
        element = f"{whole}#{index}"
        if element not in made:
            shapes = tuple_elements(made[whole].shape) if whole in made and made[whole].shape.startswith("(") else []
            if index >= len(shapes):
                refuse(f"%{element} is read, but %{whole} has no such element")
            attributes = f", index={index}" + _metadata(made[whole])
            made[element] = Instruction(element, shapes[index], "get-tuple-element", f"%{whole}", attributes, False)
        whole = element


def _metadata(instruction: Instruction) -> str:
    return f', metadata={{op_name="{instruction.op_name}"}}' if instruction.op_name else ""


def _check(module: Module) -> None:
    """Raise UserError where a name stands for nothing, which a text of another format would show."""
    for name, computation in module.computations.items():
        for instruction in computation.values():
            _check_operands(instruction, computation, name)
            called = called_computations(instruction)
            if instruction.opcode == "while":
                called = [str(instruction.attribute("body"))]
            if instruction.opcode in _CALLERS and not called:
                refuse(f"%{instruction.name} calls nothing")
            for each in called:
                if each not in module.computations:
                    refuse(f"%{instruction.name} calls {each}, which is not there")


def _check_operands(instruction: Instruction, computation: Computation, name: str) -> None:
    if instruction.opcode in _WITHOUT_OPERANDS:
        return
    names = instruction.operand_names
    if not names and instruction.operands:
        refuse(f"operands without names: {instruction.opcode}({instruction.operands:.60})")
    for each in names:
        if each not in computation:
            refuse(f"%{instruction.name} of {name} reads %{each}, which is not there")


# ---- shapes


def arrays(shape: str) -> list[Array]:
    """The array of an array shape, or all arrays of a tuple."""
    found = []
    for letters, bits, sizes, _ in _ARRAY.findall(shape):
        width = 8 if letters == "pred" else int(bits or 0)
        dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        found.append(Array(f"{letters}{bits}", dims, math.ceil(math.prod(dims) * width / 8)))
    return found


def shape_bytes(shape: str) -> int:
    """Bytes of an array shape such as bf16[8,128]{1,0:T(8,128)}, or of all arrays of a tuple."""
    return sum(array.bytes for array in arrays(shape))


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
            parts.append(re.sub(r"^\s*(/\*index=\d+\*/)?", "", shape[start:position]))
            start = position + 1
    return [part for part in parts if part]


def result_shape(instruction: Instruction) -> str:
    """The shape that a collective returns; its asynchronous start returns (what it reads, that, ...) as one tuple.

    Only all-reduce-start returns the result alone.
    """
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return tuple_elements(instruction.shape)[1]
    return instruction.shape


# ---- what calls what


def called_computations(instruction: Instruction) -> list[str]:
    """Computations that a fusion, a call, a conditional or the start of an asynchronous operation runs."""
    match instruction.opcode:
        case "call":
            called = [instruction.attribute("to_apply") or instruction.attribute("calls")]
        case "fusion" | "async-start":
            called = [instruction.attribute("calls")]
        case "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            if branches:
                return _NAME.findall(branches[1])
            called = [instruction.attribute(f"{which}_computation") for which in ("true", "false")]
        case _:
            called = []
    return [name for name in called if name is not None]


def root_of(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(instruction for instruction in computation.values() if instruction.is_root)
