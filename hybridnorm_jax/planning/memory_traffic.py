"""How many bytes of a device's memory (HBM) a compiled program reads and writes, counted in XLA's text of it."""

import dataclasses
import math
import re
from typing import NamedTuple

from hybridnorm_jax.planning.collectives import CONTINUES_COLLECTIVE, KINDS
from hybridnorm_jax.planning.executions import Loops, executions
from hybridnorm_jax.planning.hlo_text import (
    Computation,
    Instruction,
    Module,
    parse_module,
    result_shape,
    root_of,
    tuple_elements,
)
from hybridnorm_jax.planning.model_parts import REST, ModelParts

# They name what is there already, or end what was counted where it began.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "reshape",
    "after-all",
    "opt-barrier",
    "async-update",
}
# Custom calls that make or name a place in memory, and move nothing.
_PLACES = {"AllocateBuffer", "ConcatBitcast"}
# They run other instructions, which count by themselves.
_CALLERS = {"while", "call", "conditional", "async-start"}
# They read of their first operand as much as they return.
_SLICES = {"dynamic-slice", "slice", "gather"}
# Inside a fusion they compute what is asked of them and no more.
_PASSED = {"bitcast", "reshape", "copy", "transpose", "convert"}
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\](?:\{([^{}]*)\})?")


class Moved(NamedTuple):
    """What one instruction moves each time it runs.

    Attributes:
      name: of the instruction.
      bytes: read and written, with the padding of tiles.
      times: how often it runs.
      part: of the model, one of model_parts.PARTS.
    """

    name: str
    bytes: int
    times: int
    part: str = REST


def memory_traffic(text: str, *, of_loop: bool = False, unknown_trips: int = 1) -> list[Moved]:
    """What one execution of a compiled module moves between memory and cores, most first.

    Every instruction that runs by itself reads its operands from memory and writes its result there; what happens
    inside a fusion stays in registers. Of what is sliced the slice is read, also inside a fusion. Of what is updated in
    place, or scattered into, the tiles that the updates touch are read and written. What a TPU keeps beside its cores
    (S(1) in the text) does not count. Nothing is found in a cache. All branches of a conditional count.

    Args:
      text: of the module after optimization.
      of_loop: count one turn of the one loop of its entry instead.
      unknown_trips: how often a loop turns whose text does not say it.

    Raises:
      UserError: it cannot be read as the text of a module.
      ValueError: it does not have that one loop.
    """
    module = parse_module(text)
    parts = ModelParts(module)
    start = _loop_body(module) if of_loop else module.entry
    moved = []
    for each in executions(module, Loops(unknown_trips), start=start, into_fusions=False):
        opcode = each.instruction.opcode
        if opcode not in _FREE and opcode not in _CALLERS and not opcode.endswith("-done"):
            size = _bytes(each.instruction, module.computations[each.place], module)
            moved.append(Moved(each.instruction.name, size, each.times, parts.of(each)))
    return sorted(moved, key=lambda each: -each.bytes * each.times)


def total_bytes(moved: list[Moved]) -> int:
    """All bytes together."""
    return sum(each.bytes * each.times for each in moved)


def memory_bytes(shape: str) -> int:
    """Bytes of memory that an array or all arrays of a tuple take; bf16[8,100]{1,0:T(8,128)(2,1)} takes 2,048."""
    return sum(_padded_bytes(array) for array in _ARRAY.finditer(shape) if not _is_beside_cores(array))


def _loop_body(module: Module) -> str:
    loops = [each for each in module.computations[module.entry].values() if each.opcode == "while"]
    if len(loops) != 1:
        raise ValueError(f"{module.entry}: {len(loops)} loops, not one")
    return str(loops[0].attribute("body"))


def _is_beside_cores(array: re.Match) -> bool:
    return re.search(r"S\([1-9]", array[4] or "") is not None


def _padded_bytes(array: re.Match) -> int:
    letters, bits, sizes, layout = array.groups(default="")
    width = 8 if letters == "pred" else int(bits or 0)
    dims = [int(size.lstrip("<=")) for size in sizes.split(",") if size]
    order, _, tiling = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if tile and order:
        most_minor_first = [int(dim) for dim in order.split(",")]
        for side, dim in zip(reversed(tile[1].split(",")), most_minor_first, strict=False):
            dims[dim] = -(-dims[dim] // int(side)) * int(side)
    return math.ceil(math.prod(dims) * width / 8)


def _size(shape: str) -> int:
    """How many numbers an array shape has."""
    array = _ARRAY.search(shape)
    return math.prod(int(size.lstrip("<=")) for size in array[3].split(",") if size) if array else 0


def _bytes(instruction: Instruction, caller: Computation, module: Module) -> int:
    """What one instruction reads and writes."""
    operands = [caller[name].shape for name in instruction.operand_names if name in caller]
    match instruction.opcode:
        case "fusion":
            inside = module.computations[instruction.attribute("calls")]
            target = root_of(inside).target
            if target == "AsyncCollectiveDone":
                return 0  # of arrays that the start was given and made
            if target == "AsyncCollectiveStart":
                return sum(map(memory_bytes, operands)) + _made_by_collectives(inside)
            shape = instruction.shape
            if (instruction.attribute("calls") or "").startswith(CONTINUES_COLLECTIVE):
                inside, shape = _without_collective(inside, shape)
            read = sum(
                round(memory_bytes(shape) * _share_read(_parameter(inside, number), inside, module))
                for number, shape in enumerate(operands)
            )
            return read + _written(shape, root_of(inside), inside, module)
        case "copy-start" | "slice-start" as opcode:  # (destination, source, ...); ((source), destination, ...)
            place = 0 if opcode == "copy-start" else 1
            destination = _ARRAY.search(tuple_elements(instruction.shape)[place])
            sides = [not _is_beside_cores(destination), bool(memory_bytes(operands[0]))]
            return sum(sides) * _padded_bytes(destination)
        case opcode if opcode.removesuffix("-start") in KINDS:
            return sum(map(memory_bytes, operands)) + memory_bytes(result_shape(instruction))
        case "dynamic-update-slice":
            return _updated(instruction, instruction.shape, caller)
        case "scatter" if len(operands) == 3:
            return sum(map(memory_bytes, operands[1:])) + _updated(instruction, instruction.shape, caller)
        case opcode if opcode in _SLICES:
            return 2 * memory_bytes(instruction.shape)
        case "custom-call" if instruction.target in _PLACES:
            return 0
    # A GPU's library calls return the memory that they work in, s8, besides their results.
    result = re.sub(r"\bs8\[\d+\]", "", instruction.shape) if instruction.opcode == "custom-call" else instruction.shape
    return sum(map(memory_bytes, operands)) + memory_bytes(result)


def _made_by_collectives(inside: Computation) -> int:
    return sum(memory_bytes(each.shape) for each in inside.values() if each.opcode in KINDS)


def _without_collective(inside: Computation, shape: str) -> tuple[Computation, str]:
    """A fusion that carries on a collective beside its own work, and its result's shape, without that collective.

    The arrays that are sent and received only pass through: they are elements of the tuple that it returns.
    """
    kept = {name: each for name, each in inside.items() if each.opcode not in KINDS}
    root = root_of(inside)
    passing = {name for name in root.operand_names if name not in kept or kept[name].opcode == "parameter"}
    if root.opcode != "tuple" or not passing:
        return kept, shape
    elements = zip(tuple_elements(shape), root.operand_names, strict=True)
    own = [(element, name) for element, name in elements if name not in passing]
    shape = f"({', '.join(element for element, _ in own)})"
    operands = ", ".join(f"%{name}" for _, name in own)
    return kept | {root.name: dataclasses.replace(root, shape=shape, operands=operands)}, shape


def _parameter(inside: Computation, number: int) -> Instruction:
    return next(each for each in inside.values() if each.opcode == "parameter" and each.operands == str(number))


def _share_read(value: Instruction, inside: Computation, module: Module) -> float:
    """Which share of a value, an array, the rest of its computation reads."""
    share = 0.0
    for user in inside.values():
        for place, name in enumerate(user.operand_names):
            if name != value.name:
                continue
            if user.opcode in _SLICES and place == 0:
                share += _size(user.shape) / max(_size(value.shape), 1)
            elif user.opcode in _PASSED:
                share += 1.0 if user.is_root else _share_read(user, inside, module)
            elif user.opcode == "fusion":
                within = module.computations[user.attribute("calls")]
                share += _share_read(_parameter(within, place), within, module)
            elif not _is_in_place(user, inside) or place != 0:
                share += 1.0
    return min(share, 1.0)


def _written(shape: str, value: Instruction, inside: Computation, module: Module) -> int:
    """What a fusion whose root computes this value writes: of an update in place the update alone."""
    if value.opcode == "tuple":
        elements = zip(tuple_elements(shape), value.operand_names, strict=True)
        return sum(_written(element, inside[name], inside, module) for element, name in elements)
    if value.opcode == "fusion":
        within = module.computations[value.attribute("calls")]
        return _written(shape, root_of(within), within, module)
    if value.opcode in _PASSED and value.operand_names[0] in inside and shape.startswith(value.shape[:2]):
        return _written(shape, inside[value.operand_names[0]], inside, module)
    return _updated(value, shape, inside) if _is_in_place(value, inside) else memory_bytes(shape)


def _is_in_place(value: Instruction, inside: Computation) -> bool:
    """A fusion changes parts of its first operand to compute this value, and leaves the rest where it is.

    Of scatters only those of one array that the fusion is given, and gives back as the scatter leaves it. Others count
    as if they read and wrote all of it.
    """
    if value.opcode != "scatter":
        return value.opcode == "dynamic-update-slice"
    root = root_of(inside)
    given = inside[value.operand_names[0]].opcode == "parameter"
    given_back = value.is_root or (root.opcode == "tuple" and value.name in root.operand_names)
    return given and given_back and len(value.operand_names) == 3


def _updated(update: Instruction, shape: str, inside: Computation) -> int:
    """What an update in place of an array of this shape reads and writes: the tiles that it touches."""
    array = _ARRAY.search(shape)
    values = _ARRAY.search(inside[update.operand_names[2 if update.opcode == "scatter" else 1]].shape)
    sizes = [int(size) for size in values[3].split(",") if size]
    window = _window(update, sizes, len(array[3].split(","))) if update.opcode == "scatter" else sizes
    letters, layout = shape[: shape.index("[")], array[4] or ""
    tiles = memory_bytes(f"{letters}[{','.join(map(str, window))}]{{{layout}}}")
    return 2 * min(tiles * (math.prod(sizes) // max(math.prod(window), 1)), memory_bytes(shape))


def _window(scatter: Instruction, updates: list[int], dims: int) -> list[int]:
    """The sizes of what a scatter changes of its array in each place.

    Args:
      updates: the sizes of its updates.
      dims: how many dimensions the array has.
    """
    of_windows = [updates[dim] for dim in scatter.numbers("update_window_dims")]
    single = {*scatter.numbers("inserted_window_dims"), *scatter.numbers("input_batching_dims")}
    return [1 if dim in single else of_windows.pop(0) for dim in range(dims)]
