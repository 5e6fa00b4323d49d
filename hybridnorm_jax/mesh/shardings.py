"""Where parameters lie on the mesh: the rules applied to the logical axes of each."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridnorm_jax.mesh.device_mesh import parts_of
from hybridnorm_jax.mesh.parameter_axes import logical_axes
from hybridnorm_jax.mesh.sharding_rules import RULES, Rules, first_entry


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """The spec that the rules give these logical axes, see sharding_rules.DEFAULT_RULES."""
    return PartitionSpec(*(_spec_entry(split) for split in _splits(axes, shape, mesh, rules)))


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """For parameters, or a training state that holds trees like them: the same tree of NamedShardings."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = logical_axes(_names(path), leaf.ndim)
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh, rules))

    return jax.tree.map_with_path(sharding, tree)


def undivided(params: Any, mesh: Mesh, rules: Rules = RULES) -> list[str]:
    """What does not lie where its first rule says, because an axis does not divide it; for the start-up report."""
    lines: set[str] = set()
    for path, leaf in jax.tree.leaves_with_path(params):
        axes = logical_axes(_names(path), leaf.ndim)
        for axis, size, split in zip(axes, leaf.shape, _splits(axes, leaf.shape, mesh, rules), strict=True):
            wanted = first_entry(rules, axis)
            if size % parts_of(wanted, mesh) == 0:
                continue
            over = " x ".join(_larger_than_1(wanted, mesh))
            where = f"is split by {' x '.join(split)} alone" if split else "stays whole"
            lines.add(f"{axis}={size} {where}: not divisible by {over}")
    return sorted(lines)


def _splits(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> list[tuple[str, ...]]:
    """For each dimension, the mesh axes larger than 1 that split it."""
    taken: set[str] = set()
    splits = []
    for axis, size in zip(axes, shape, strict=True):
        entries = rules.get(axis, ()) if axis is not None else ()
        fitting = (entry for entry in entries if taken.isdisjoint(entry) and size % parts_of(entry, mesh) == 0)
        split = _larger_than_1(next(fitting, ()), mesh)
        taken.update(split)
        splits.append(split)
    return splits


def _larger_than_1(axes: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _spec_entry(split: tuple[str, ...]) -> tuple[str, ...] | str | None:
    """A dimension's entry in a PartitionSpec, in its shortest form."""
    if not split:
        return None
    return split[0] if len(split) == 1 else split


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A path of jax.tree as plain names, whatever the kinds of its keys."""
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)
