"""Which devices take part in a collective together, in the notations of XLA's text."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hybridnorm_jax.planning.hlo_text import Instruction, refuse


class Groups(NamedTuple):
    """The groups of devices of a collective.

    Attributes:
      size: devices of the largest group.
      nodes: how many slices or nodes that group is in.
    """

    size: int
    nodes: int


def groups_of(collective: Instruction, nodes: Sequence[int]) -> Groups:
    """Who takes part in a collective. Of collective-permute every pair of a source and a target is a group.

    Args:
      nodes: of each device of the program, which slice or node it is in.

    Raises:
      UserError: the notation is not known.
    """
    groups = [list(group) for group in _written_groups(collective)] or [list(range(max(len(nodes), 1)))]
    places = [len({_node(device, nodes) for device in group}) for group in groups]
    return Groups(size=max(map(len, groups)), nodes=max(places))


def _node(device: int, nodes: Sequence[int]) -> int:
    return nodes[device] if nodes else 0


def _written_groups(collective: Instruction) -> Iterable[Iterable[int]]:
    """The groups; none where all devices are one group."""
    text = collective.attributes
    pairs = re.search(r"\bsource_target_pairs=\{((?:\{[\d,]+\},?)*)\}", text)
    listed = pairs or re.search(r"\breplica_groups=\{((?:\{[\d,]+\},?)*)\}", text)
    if listed:
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    counted = re.search(r"\breplica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if counted:
        return _counted(*counted.groups())
    meshed = re.search(r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", text)
    if meshed:
        return _meshed(*meshed.groups(), collective)
    if "replica_groups=" in text or "source_target_pairs=" in text:
        refuse(f"the groups of %{collective.name}{text:.80}")
    return []


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _counted(rows: str, columns: str, sides: str, order: str | None) -> np.ndarray:
    """[rows,columns]<=[sides]T(order): all devices in the shape `sides`, transposed, as rows of groups."""
    return _transposed(sides, order).reshape(int(rows), int(columns))


def _transposed(sides: str, order: str | None) -> np.ndarray:
    sizes = _numbers(sides)
    return np.arange(np.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None)


def _meshed(axes: str, devices: str | None, grouped: str, collective: Instruction) -> np.ndarray:
    """mesh['x'=2,'y'=4] {'y'}: devices along the named axes are a group; 'y':(2)2 is y's part of size 2 after 2.

    Args:
      devices: of the mesh in order, as [sides]T(order) or a list; None: 0, 1, ...
    """
    named = dict(re.findall(r"'([^']*)'=(\d+)", axes))
    found = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped)
    order = _device_order(devices, math.prod(map(int, named.values())))
    if not found or order is None or any(name not in named for name, _, _ in found):
        refuse(f"the groups of %{collective.name}: mesh[{axes}] {devices} {{{grouped}}}")
    sides: list[int] = []
    along: list[int] = []
    for name, size in named.items():
        done = 1
        for before, part in sorted(
            (int(before or 1), int(part or size)) for each, before, part in found if each == name
        ):
            sides += [before // done, part]
            along.append(len(sides) - 1)
            done = before * part
        sides.append(int(size) // done)
    last = range(len(sides) - len(along), len(sides))
    group = math.prod(sides[axis] for axis in along)
    return np.moveaxis(order.reshape(sides), along, list(last)).reshape(-1, group)


def _device_order(devices: str | None, count: int) -> np.ndarray | None:
    """The devices of a mesh in order; None where the notation is not known."""
    if devices is None:
        return np.arange(count)
    if transposed := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", devices):
        return _transposed(*transposed.groups()).reshape(-1)
    return np.array(_numbers(devices)) if re.fullmatch(r"[\d,]+", devices) else None
