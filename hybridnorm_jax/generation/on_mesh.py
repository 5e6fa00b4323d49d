"""Generation where the parameters lie on a mesh: its batch and its heads are split as in training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from hybridnorm_jax.mesh.device_mesh import parts_of
from hybridnorm_jax.mesh.sharding_rules import RULES, first_entry


@contextlib.contextmanager
def on_mesh_of(params: Any) -> Iterator[int]:
    """Trace and run what is inside on the mesh of the parameters; gives the number into which it splits a batch.

    The rules are those in force (see use_mesh), or the usual ones. But single tokens have no sequence to split. Where
    the parameters lie on no mesh, or on one of other axes, XLA alone decides; the batch may then have any size.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    rules = dict(nn.get_logical_axis_rules()) or {name: first_entry(RULES, name) for name in RULES}
    if not isinstance(sharding, NamedSharding) or not set(rules["batch"]) <= set(sharding.mesh.axis_names):
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
