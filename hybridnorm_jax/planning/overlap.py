"""Whether a GPU's program computes while its collectives are under way, read from the schedule in its text."""

from typing import NamedTuple

from hybridnorm_jax.planning.executions import Loops, executions
from hybridnorm_jax.planning.hlo_text import Computation, parse_module

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WORK = {"fusion", "custom-call", "dot", "convolution", "while", "call", "conditional", "sort", "copy"}


class Overlap(NamedTuple):
    """Of a compiled program.

    Attributes:
      collectives: how many instructions of its text start one.
      alone: names of those beside which nothing runs: they end where they start, or right behind.
    """

    collectives: int
    alone: list[str]


def read_overlap(text: str) -> Overlap:
    """What stands between the start and the end of each collective, in the order in which the program runs.

    A collective that stands directly before its user has nothing there. How long the work between takes is not asked.

    Args:
      text: of a module after optimization, whose instructions stand in the order of their schedule.

    Raises:
      UserError: it cannot be read as the text of a module.
    """
    module = parse_module(text)
    places = {each.place for each in executions(module, Loops(), into_fusions=False)}
    found, alone = 0, []
    for place in sorted(places):
        computation = module.computations[place]
        for instruction in computation.values():
            if instruction.opcode.removesuffix("-start") in _KINDS:
                found += 1
                alone += [] if _runs_beside(computation, instruction.name) else [instruction.name]
    return Overlap(found, sorted(alone))


def _runs_beside(computation: Computation, name: str) -> bool:
    """Whether something computes between this start of a collective and its end."""
    order = iter(computation.values())
    for instruction in order:
        if instruction.name == name:
            break
    works = False
    for instruction in order:
        if instruction.opcode.endswith("-done") and name in instruction.operand_names:
            return works
        works = works or instruction.opcode in _WORK
    return False  # it has no end of its own, so it is not asynchronous
