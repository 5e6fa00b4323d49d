"""Which mesh axes split a logical axis, for what computes by hand on a mesh (jax.shard_map) inside the model."""

import math

import jax
from flax import linen as nn
from jax.sharding import AxisType


def split_axes(name: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh in force that split the logical axis `name` of this size; none where they do not divide.

    Mesh and rules are those of jax.set_mesh and flax.linen.logical_axis_rules. Axes of size 1 and manual ones (inside a
    jax.shard_map) are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (assigned,) = nn.logical_to_mesh_axes((name,)) or (None,)
    assigned = (assigned,) if isinstance(assigned, str) else assigned or ()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(axis for axis in assigned if types.get(axis) == AxisType.Auto and mesh.shape[axis] > 1)
    return axes if size % parts(axes) == 0 else ()


def parts(axes: tuple[str, ...]) -> int:
    """Into how many parts these axes of the mesh in force split a dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)
