"""What a compiled program sends between devices, and over which network, read from XLA's text of it."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hybridnorm_jax.planning.device_groups import groups_of
from hybridnorm_jax.planning.executions import Loops, executions
from hybridnorm_jax.planning.hlo_text import Computation, Instruction, parse_module, result_shape, shape_bytes
from hybridnorm_jax.planning.model_parts import ModelParts

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BETWEEN_SLICES = " between slices"
# How XLA for TPUs names a fusion that carries on, beside its own work, a collective that another fusion started.
CONTINUES_COLLECTIVE = "async_collective_fusion"


class Links(NamedTuple):
    """Bytes that a device has to send over each network, at the least.

    Attributes:
      inside: between devices of a slice or node: a TPU's links, NVLink.
      between: between slices or nodes.
    """

    inside: float
    between: float


class Sent(NamedTuple):
    """A collective.

    Attributes:
      kind: one of KINDS; or "all-reduce between slices" and the like, where a slice is one participant.
      part: of the model, one of model_parts.PARTS.
      bytes: of one time, the larger of what goes in and what comes out on one device, without the padding of tiles.
      links: of one time, what has to be sent.
      times: how often it runs.
    """

    kind: str
    part: str
    bytes: int
    links: Links
    times: int


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind that one device takes part in, in one step.

    Attributes:
      count: how many there are.
      bytes: of all of them, as Sent.bytes.
    """

    count: int = 0
    bytes: int = 0


@dataclasses.dataclass
class Collectives:
    """The collectives of one execution.

    Attributes:
      sent: each of them.
      unknown_loops: how many loops with collectives inside were counted as if they ran once.
    """

    sent: list[Sent]
    unknown_loops: int

    @property
    def kinds(self) -> dict[str, Traffic]:
        """Kind -> its traffic."""
        found: dict[str, Traffic] = {}
        for each in self.sent:
            traffic = found.setdefault(each.kind, Traffic())
            traffic.count += each.times
            traffic.bytes += each.bytes * each.times
        return found

    @property
    def links(self) -> Links:
        """All bytes that a device has to send over each network, at the least."""
        return Links(
            inside=sum(each.links.inside * each.times for each in self.sent),
            between=sum(each.links.between * each.times for each in self.sent),
        )


def read_collectives(text: str, nodes: Sequence[int] | None = None) -> Collectives:
    """The collectives of one execution of a compiled module.

    A collective in a loop counts as often as the loop runs. Every branch of a conditional counts. An asynchronous
    collective counts once, where it starts, even where the TPU compiler spreads it over several fusions. What that
    compiler calls all-reduce-scatter, an all-reduce of which each device keeps its part, is a reduce-scatter. What goes
    over the slow network between slices, where a slice is one participant, is a kind of its own: "all-reduce between
    slices".

    Args:
      text: of the module after optimization.
      nodes: of each device of the program, the number of its slice or node; None: all in one.

    Raises:
      UserError: it cannot be read as the text of a module.
    """
    module = parse_module(text)
    parts, loops = ModelParts(module), Loops()
    places = _places(text) if nodes is None else nodes
    sent: list[Sent] = []
    around: set[str] = set()
    for execution in executions(module, loops, enter=_is_no_continuation):
        instruction = execution.instruction
        kind = _kind(instruction, execution.place)
        if kind is not None:
            size = _message_bytes(instruction, module.computations[execution.place])
            links = _links(kind, size, instruction, places)
            sent.append(Sent(kind, parts.of(execution), size, links, execution.times))
            around.update(caller.name for caller, _ in execution.callers)
    return Collectives(sent, unknown_loops=len(around.intersection(loops.unknown)))


def kernels(text: str) -> list[str]:
    """Names of the Pallas kernels in a module, sorted; without what JAX's transformations put around them."""
    on_tpu = re.findall(r"%?([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", text)
    on_gpu = re.findall(r"custom_call_target=\"[^\"\n]*triton[^\"\n]*\"[^\n]*\bname = \"(\w+)\"", text)
    own_names = {re.sub(r"^((transpose|jvp|vmap)_+)+|_*(\.\w+)*$", "", name) for name in on_tpu}
    return sorted(own_names | set(on_gpu))


def _places(text: str) -> list[int]:
    """As `nodes` of read_collectives, for a program of one slice or node."""
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return [0] * math.prod(map(int, counts))


def _kind(instruction: Instruction, place: str) -> str | None:
    """The kind of collective that an instruction is; None for every other instruction."""
    if instruction.opcode == "send":
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        return f"{transfer[1].lower().replace('_', '-')}{_BETWEEN_SLICES}" if transfer else None
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and place.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in KINDS else None


def _is_no_continuation(name: str, instructions: Iterable[Instruction]) -> bool:
    """False for a fusion that continues a collective which another one started (its target is AsyncCollectiveStart)."""
    ends = any(instruction.target == "AsyncCollectiveDone" for instruction in instructions)
    return not ends and not name.startswith(CONTINUES_COLLECTIVE)


def _message_bytes(instruction: Instruction, computation: Computation) -> int:
    operands = sum(shape_bytes(computation[name].shape) for name in instruction.operand_names)
    if instruction.opcode == "send":
        return operands
    return max(operands, shape_bytes(result_shape(instruction)))


def _links(kind: str, size: int, instruction: Instruction, nodes: Sequence[int]) -> Links:
    """What a device has to send at the least, however the collective is done.

    Of n devices each sends (n - 1) / n of the whole array, for an all-reduce twice. Devices of one node that all need
    the same from another share what comes in; of an all-to-all each needs something else.
    """
    if kind.endswith(_BETWEEN_SLICES):
        slices = len(set(nodes))
        return Links(inside=0, between=_share(kind.removesuffix(_BETWEEN_SLICES), slices) * size)
    groups = groups_of(instruction, nodes)
    if kind == "collective-permute":
        return Links(inside=0, between=size) if groups.nodes > 1 else Links(inside=size, between=0)
    if groups.nodes == 1:
        return Links(inside=_share(kind, groups.size) * size, between=0)
    neighbours = groups.size / groups.nodes
    sharing = 1 if "all-to-all" in kind else neighbours
    return Links(
        inside=_share(kind, neighbours) * size / (groups.nodes if "all-to-all" in kind else 1),
        between=_share(kind, groups.nodes) * size / sharing,
    )


def _share(kind: str, participants: float) -> float:
    share = (participants - 1) / participants if participants else 0
    return 2 * share if kind == "all-reduce" else share
