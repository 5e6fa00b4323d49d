"""The parameters of a Hugging Face directory straight onto the devices of a mesh, layer by layer.

The host holds one layer at a time, as it is read, or one tensor outside the layers: a model that fits no single host
is read onto the devices of several, each of which reads the files and hands over what its own devices hold.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.safetensors_files import StoredTensors, is_finite
from hybridnorm_jax.interop.tensor_places import Index, Place

Shape = tuple[int, ...]


def read_place(tensors: StoredTensors, place: Place, targets: Sequence[np.ndarray]) -> None:
    """Read one tensor into slices of our leaves, in their dtype.

    Raises:
      UserError: it holds NaN or Inf, in that dtype.
    """
    with np.errstate(over="ignore"):  # What does not fit the dtype becomes Inf, which is looked for next.
        place.read(tensors.read(place.name), targets)
    if not all(map(is_finite, targets)):
        raise UserError(f"{tensors.where(place.name)}: holds NaN or Inf, read as {targets[0].dtype.name}")


def placed_params(
    tensors: StoredTensors, places: Sequence[Place], shapes: Mapping[str, Shape], dtype: np.dtype, shardings: Any
) -> dict[str, Any]:
    """The tree of parameters, as jax arrays.

    Args:
      tensors: of the directory.
      places: of the model, layer after layer.
      shapes: of the leaves by path.
      dtype: of the parameters.
      shardings: one for all leaves, or a tree of them like the parameters'.

    Raises:
      UserError: shardings for other leaves than the model has; a tensor holds NaN or Inf; dtype=float64 without
        jax_enable_x64.
    """
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise UserError("dtype=float64: arrays of JAX have it with jax_enable_x64 alone")
    where = _by_path(shardings, shapes)
    leaves: dict[str, jax.Array] = {}
    for (_, layer), group in itertools.groupby(places, key=_layer_of):
        for path, buffer in _read_layer(tensors, list(group), shapes, layer, dtype).items():
            if not layer:
                leaves[path] = _on_devices(buffer, where[path])
                continue
            if path not in leaves:
                leaves[path] = _zeros(shapes[path], dtype.name, where[path])
            part = _on_devices(buffer, _of_a_layer(where[path]))
            leaves[path] = _replaced(where[path])(leaves[path], part, layer[0])
        # Otherwise the host would read ahead of the devices, and hold what they have not taken yet.
        jax.block_until_ready(leaves)
    return unflatten_dict(leaves, sep="/")


def _layer_of(place: Place) -> tuple[str, Index]:
    """The run and the layer in it that a tensor belongs to; an index () outside the runs."""
    piece = place.slices[0]
    return (piece.path.partition("/")[0] if piece.index else ""), piece.index[:1]


def _read_layer(
    tensors: StoredTensors, places: Sequence[Place], shapes: Mapping[str, Shape], layer: Index, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """What the tensors of one layer hold of each leaf."""
    buffers: dict[str, np.ndarray] = {}
    for place in places:
        for piece in place.slices:
            if piece.path not in buffers:
                buffers[piece.path] = np.empty(shapes[piece.path][len(layer) :], dtype)
        read_place(tensors, place, [buffers[piece.path][piece.index[len(layer) :]] for piece in place.slices])
    return buffers


def _by_path(shardings: Any, shapes: Mapping[str, Shape]) -> Mapping[str, Sharding]:
    if isinstance(shardings, Sharding):
        return dict.fromkeys(shapes, shardings)
    given = flatten_dict(shardings, sep="/") if isinstance(shardings, Mapping) else {}
    for path in (*shapes, *given):
        if path not in shapes or not isinstance(given.get(path), Sharding):
            raise UserError(f"shardings: {path}: must have a sharding for each parameter of the model, and no other")
    return given


def _of_a_layer(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked leaf."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _on_devices(buffer: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(buffer.shape, sharding, lambda index: buffer[index])


@functools.lru_cache(maxsize=256)
def _maker(shape: Shape, dtype: str, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _zeros(shape: Shape, dtype: str, sharding: Sharding) -> jax.Array:
    return _maker(shape, dtype, sharding)()


@functools.lru_cache(maxsize=256)
def _replaced(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(stacked leaf, one layer of it, its number) -> the leaf with this layer, in the same memory."""

    def replace(stack: jax.Array, part: jax.Array, layer: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, part, layer, axis=0)

    return jax.jit(replace, donate_argnums=0, out_shardings=sharding)
