"""Which mesh axes split a logical axis, for what computes by hand on a mesh (jax.shard_map) inside the model.

Mesh and rules are the ones in force: those of jax.set_mesh and of flax.linen.logical_axis_rules.
"""

import jax
from flax import linen as nn
from jax.sharding import AxisType

from hybridnorm_jax.mesh.device_mesh import parts_of

# Mesh axes that split one dimension together.
Axes = tuple[str, ...]


def split_axes(name: str, size: int, *, taken: Axes = ()) -> Axes:
    """The mesh axes that split the logical axis `name`; none where they do not divide its size.

    Axes of size 1, manual ones (inside a jax.shard_map) and those that another dimension has taken are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = tuple(axis for axis in _assigned(name) if axis not in taken)
    axes = tuple(axis for axis in free if types.get(axis) == AxisType.Auto and mesh.shape[axis] > 1)
    return axes if size % parts(axes) == 0 else ()


def parts(axes: Axes) -> int:
    """Into how many parts these axes of the mesh in force split a dimension."""
    return parts_of(axes, jax.sharding.get_abstract_mesh())


def _assigned(name: str) -> Axes:
    """The mesh axes that the rules give to a logical axis."""
    spec = nn.logical_to_mesh_axes((name,))
    if not spec or spec[0] is None:
        return ()
    (axes,) = spec
    return (axes,) if isinstance(axes, str) else axes
