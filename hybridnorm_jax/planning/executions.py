"""Every instruction that one run of a compiled module executes, with how often: loops multiplied by their trips."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from hybridnorm_jax.kernels.mean_turns import turns_of
from hybridnorm_jax.planning.hlo_text import Computation, Instruction, Module, called_computations, root_of


class Execution(NamedTuple):
    """An instruction that one run of a module executes.

    Attributes:
      place: the name of its computation.
      times: how often.
      callers: the loops, calls and fusions around it, the outermost first, each with its computation's name.
    """

    instruction: Instruction
    place: str
    times: int
    callers: tuple[tuple[Instruction, str], ...] = ()


@dataclasses.dataclass
class Loops:
    """Collects the loops that do not turn a fixed number of times.

    Attributes:
      unknown_trips: how often a loop is taken to turn that says nothing.
      unknown: the names of such loops.
      balanced: the names of loops that turn as often as the data ask for, and say how often that is where the load is
        balanced, see kernels/mean_turns.py; they are taken to turn so often.
    """

    unknown_trips: int = 1
    unknown: list[str] = dataclasses.field(default_factory=list)
    balanced: list[str] = dataclasses.field(default_factory=list)

    def turns(self, loop: Instruction, caller: Computation, computations: dict[str, Computation]) -> int:
        """How often a while loop is taken to turn. Arguments as those of trip_count."""
        trips = trip_count(loop, caller, computations)
        if trips is not None:
            return trips
        balanced = turns_of(loop.op_name)
        if balanced is not None:
            self.balanced.append(loop.name)
            return balanced
        self.unknown.append(loop.name)
        return self.unknown_trips


def executions(
    module: Module,
    loops: Loops,
    *,
    start: str | None = None,
    into_fusions: bool = True,
    enter: Callable[[str, Iterable[Instruction]], bool] = lambda name, instructions: True,
) -> Iterator[Execution]:
    """Everything that one run of a module executes, every branch of a conditional included.

    Args:
      loops: says how often unknown loops turn, and is told of them.
      start: the computation to begin with; None: the entry.
      into_fusions: also what happens inside a fusion.
      enter: (name, instructions of a computation) -> whether to look into it.
    """
    yield from _executions(module, loops, Execution(_ENTRY, start or module.entry, 1), into_fusions, enter)


_ENTRY = Instruction("", "()", "call", "", "", is_root=False)


def _executions(
    module: Module,
    loops: Loops,
    at: Execution,
    into_fusions: bool,
    enter: Callable[[str, Iterable[Instruction]], bool],
) -> Iterator[Execution]:
    computation = module.computations[at.place]
    if not enter(at.place, computation.values()):
        return
    for instruction in computation.values():
        here = Execution(instruction, at.place, at.times, at.callers)
        yield here
        times, called = at.times, called_computations(instruction)
        if instruction.opcode == "while":
            trips = loops.turns(instruction, computation, module.computations)
            times, called = times * trips, [str(instruction.attribute("body"))]
        elif instruction.opcode == "fusion" and not into_fusions:
            continue
        for name in called:
            inside = Execution(instruction, name, times, (*at.callers, (instruction, at.place)))
            yield from _executions(module, loops, inside, into_fusions, enter)


def trip_count(loop: Instruction, caller: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a while loop runs; None where the text does not say.

    Either XLA has written it down, or the condition compares a counter, an element of the carried tuple, with a
    constant, and the counter starts at a constant and grows by a constant.

    Args:
      caller: the computation with the loop.
      computations: all of the module, by name.
    """
    written = re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', loop.attributes)
    if written:
        return int(written[1])
    condition = computations.get(str(loop.attribute("condition")), {})
    compare = root_of(condition) if condition else loop
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, limit = (_source(condition.get(name), condition) for name in compare.operand_names)
    end = _constant(limit, condition)
    if end is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(str(counter.attribute("index")))
    carried = caller.get(loop.operand_names[0])
    first = _constant(_element(carried, index, caller), caller)
    step = _increment(index, computations[str(loop.attribute("body"))])
    if first is None or not step:
        return None
    return max(0, math.ceil((end - first) / step))


def _increment(index: int, body: Computation) -> int | None:
    """The constant that a loop adds to this element of the carried tuple; None where it does something else."""
    sum_ = _element(root_of(body), index, body)
    if sum_ is None or sum_.opcode != "add":
        return None
    summands = [body.get(name) for name in sum_.operand_names]
    constants = [constant for each in summands if (constant := _constant(each, body)) is not None]
    counters = [each for each in summands if _reads_carried(each, index, body)]
    return constants[0] if len(constants) == len(counters) == 1 else None


def _reads_carried(value: Instruction | None, index: int, body: Computation) -> bool:
    """Whether a value is, or copies, this element of what the body of a loop is given."""
    value = _source(value, body)
    if value is None or value.opcode != "get-tuple-element" or value.attribute("index") != str(index):
        return False
    return body[value.operand_names[0]].opcode == "parameter"


def _element(value: Instruction | None, index: int, computation: Computation) -> Instruction | None:
    """The element of a tuple at this index; None where the value is no tuple of this computation."""
    if value is None or value.opcode != "tuple":
        return None
    return computation.get(value.operand_names[index])


def _constant(value: Instruction | None, computation: Computation) -> int | None:
    """The integer constant that a value is, or copies; None for every other value."""
    value = _source(value, computation)
    if value is None or value.opcode != "constant" or not value.operands.lstrip("-").isdigit():
        return None
    return int(value.operands)


def _source(value: Instruction | None, computation: Computation) -> Instruction | None:
    """What a value copies; the value itself where it is no copy."""
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
        value = computation.get(value.operand_names[0])
    return value
