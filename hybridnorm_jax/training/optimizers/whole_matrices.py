"""Matrices that a mesh splits, exchanged so that every device has some of them whole, and back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from hybridnorm_jax.mesh.device_mesh import parts_of

# Of each dimension of an array, the mesh axes that split it.
_Splits = tuple[tuple[str, ...], ...]


def on_whole_matrices(
    function: Callable[[Array], Array], x: Array, spec: PartitionSpec, mesh: Mesh, *, batch: int
) -> Array:
    """function(x), computed on whole matrices of which every device has its share, and split as `spec` says.

    The devices that hold parts of the same matrices exchange them (all-to-all): of 8 devices and 24 layers each gets 3
    whole matrices, as many numbers as it had, and none gets all. Where there are fewer matrices than devices, some
    devices get none. Afterwards the parts go back.

    Args:
      function: of an array with the shape of x but for its first axis; matrices that are zero stay so.
      x: its first axis, the layers, is not split.
      spec: where the parts of x lie.
      batch: how many axes, the first ones of x, tell the matrices apart.
    """
    layers = x.shape[0]
    stages = _stages(spec, x.ndim, batch)
    if len(stages) == 1:
        return function(x)
    # JAX splits an axis into equal parts alone.
    missing = -layers % parts_of(stages[-1][0], mesh)
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    # What goes in and out is held to the first and last stage as well. Otherwise XLA exchanges where it likes: operands
    # of products inside of `function`, or float32 numbers that are narrowed afterwards.
    for splits in stages:
        x = _split(x, splits, mesh)
    result = function(x)
    for splits in reversed(stages):
        result = _split(result, splits, mesh)
    return result[:layers]


def _stages(spec: PartitionSpec, ndim: int, batch: int) -> list[_Splits]:
    """The splits of `spec`; and of each further stage, in which the layers take over those of one more dimension."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    splits = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    stages: list[_Splits] = [tuple(splits)]
    for dimension in range(batch, ndim):
        if splits[dimension]:
            splits[0], splits[dimension] = splits[0] + splits[dimension], ()
            stages.append(tuple(splits))
    return stages


def _split(x: Array, splits: _Splits, mesh: Mesh) -> Array:
    spec = PartitionSpec(*(axes or None for axes in splits))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
