"""Which part of the model an instruction of a compiled train step belongs to, read from the named scopes of JAX.

`training/step.py` opens the scopes `loss` and `optimizer`; Flax names every layer's module (`run_0`, `layer_3`) and the
head. What the compiler adds without a name, such as a copy, belongs to the loop around it or to what reads it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from hybridnorm_jax.planning.executions import Execution
from hybridnorm_jax.planning.hlo_text import Computation, Instruction, Module, called_computations, root_of

FORWARD, BACKWARD, LOSS, OPTIMIZER, REST = "layers forward", "layers backward", "loss", "optimizer", "rest"
# Backward includes what rematerialization computes again. Loss includes the head. Rest is the embedding, the final
# norm, positions, the sums of microbatches, conversions to an equivalent form, and what nothing has named.
PARTS = (FORWARD, BACKWARD, LOSS, OPTIMIZER, REST)

_LOSS = re.compile(r"(^|[/(])(loss|head|Decoder\.logits)([/)]|$)")
_OPTIMIZER = re.compile(r"(^|[/(])optimizer([/)]|$)")
# A layer by itself, or the loop over layers.
_LAYER = re.compile(r"(^|[/(])((run|layer)_\d+([/.)]|$)|Decoder\.hidden\)*/while([/)]|$))")
_BACKWARD = re.compile(r"(^|[/(])transpose\(")
# How far the readers of an unnamed value are followed.
_FAR = 4


def part_of(op_name: str) -> str | None:
    """The part that a path of named scopes such as "jit(train_step)/jvp(loss)/mul" belongs to; None: no path."""
    if _LOSS.search(op_name):
        return LOSS
    if _OPTIMIZER.search(op_name):
        return OPTIMIZER
    if _LAYER.search(op_name):
        return BACKWARD if _BACKWARD.search(op_name) else FORWARD
    return REST if "/" in op_name else None


class ModelParts:
    """Finds the parts of a module's instructions."""

    def __init__(self, module: Module):
        self._computations = module.computations
        self._readers: dict[str, dict[str, list[Instruction]]] = {}
        self._known: dict[tuple[str, str], str | None] = {}

    def of(self, execution: Execution) -> str:
        """The part of an instruction: by its own name, by what it fuses, by its loop, or by what reads it."""
        named = self._named(execution.instruction, execution.place)
        if named is not None:
            return named
        for caller, place in reversed(execution.callers):
            around = self._named(caller, place)
            if around is not None and around != REST:
                return around
        return self._of_neighbours(execution.instruction, execution.place) or REST

    def _named(self, instruction: Instruction, place: str) -> str | None:
        key = (place, instruction.name)
        if key not in self._known:
            self._known[key] = part_of(instruction.op_name) or self._fused(instruction)
        return self._known[key]

    def _fused(self, instruction: Instruction) -> str | None:
        """The part of the root of what an unnamed fusion or call runs, else of the first that has one."""
        for name in called_computations(instruction):
            inside = self._computations[name]
            for each in (root_of(inside), *inside.values()):
                part = self._named(each, name)
                if part is not None:
                    return part
        return None

    def _of_neighbours(self, instruction: Instruction, place: str) -> str | None:
        computation, readers = self._computations[place], self._readers_in(place)
        after = _first_part(self, [instruction], place, lambda each: readers[each.name])
        if after is not None:
            return after
        return _first_part(
            self, [instruction], place, lambda each: [computation[n] for n in each.operand_names if n in computation]
        )

    def _readers_in(self, place: str) -> dict[str, list[Instruction]]:
        if place not in self._readers:
            self._readers[place] = _readers(self._computations[place])
        return self._readers[place]


def _first_part(parts: ModelParts, nearest: list[Instruction], place: str, step) -> str | None:
    """The first part found by going from instruction to instruction."""
    for _ in range(_FAR):
        nearest = [each for instruction in nearest for each in step(instruction)]
        for each in nearest:
            part = parts._named(each, place)
            if part is not None:
                return part
    return None


def _readers(computation: Computation) -> dict[str, list[Instruction]]:
    readers: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in computation.values():
        for name in instruction.operand_names:
            readers[name].append(instruction)
    return readers


def by_part(amounts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The sums of (part, amount), every part present."""
    sums = dict.fromkeys(PARTS, 0)
    for part, amount in amounts:
        sums[part] += amount
    return sums
