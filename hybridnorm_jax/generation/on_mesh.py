"""Generation where the parameters lie on a mesh: its batch and its heads are split as in training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from hybridnorm_jax.mesh.device_mesh import parts_of
from hybridnorm_jax.mesh.sharding_rules import RULES, first_entry


def with_auto_axes(params: Any) -> Any:
    """The parameters where they lie, on a mesh whose axes are Auto: Linen's models know no others.

    The axes of jax.make_mesh are Explicit where nobody says otherwise. No number moves.
    """

    def of_leaf(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        names = sharding.mesh.axis_names
        auto = Mesh(sharding.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        return jax.device_put(leaf, NamedSharding(auto, sharding.spec, memory_kind=sharding.memory_kind))

    return jax.tree.map(of_leaf, params)


@contextlib.contextmanager
def on_mesh_of(params: Any) -> Iterator[int]:
    """Trace and run what is inside on the mesh of the parameters; gives the number into which it splits a batch.

    The rules are those in force (see use_mesh), or the usual ones. But single tokens have no sequence to split. Where
    the parameters lie on no mesh, or on one of other axes, XLA alone decides; the batch may then have any size.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    rules = dict(nn.get_logical_axis_rules()) or {name: first_entry(RULES, name) for name in RULES}
    if not isinstance(sharding, NamedSharding):
        yield 1
        return
    if not set(rules["batch"]) <= set(sharding.mesh.axis_names):
        with jax.set_mesh(sharding.mesh):  # the caller may compute on a mesh with other kinds of axes
            yield 1
        return
    rules["seq"] = ()
    with jax.set_mesh(sharding.mesh), nn.logical_axis_rules(list(rules.items())):
        yield parts_of(rules["batch"], sharding.mesh)


def readable(array: Array) -> Array:
    """The array, whole on every device of the mesh in force, so that each process can read it."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())
