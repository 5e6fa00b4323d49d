"""The device mesh, and which dimension of which array lies on which of its axes."""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybridnorm_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axes. A dimension that its mesh axes do not divide stays whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp",),
    "experts": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# Last two parts of a parameter's path -> its logical axes; inside a run "layers" comes first. Norms have no entry of
# their own: a vector is not worth the communication of sharding it.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "token_embedding/embedding": ("vocab", "embed"),
    "position_embedding/embedding": (None, "embed"),
    "head/kernel": ("embed", "vocab"),
    "head/bias": ("vocab",),
    "query/kernel": ("embed", "heads", "head_dim"),
    "key/kernel": ("embed", "kv_heads", "head_dim"),
    "value/kernel": ("embed", "kv_heads", "head_dim"),
    "out/kernel": ("heads", "head_dim", "embed"),
    "query/bias": ("heads", "head_dim"),
    "key/bias": ("kv_heads", "head_dim"),
    "value/bias": ("kv_heads", "head_dim"),
    "out/bias": (None,),
    "gate/kernel": ("embed", "mlp"),
    "up/kernel": ("embed", "mlp"),
    "down/kernel": ("mlp", "embed"),
    "gate/bias": ("mlp",),
    "up/bias": ("mlp",),
    "down/bias": (None,),
    # The router's result is needed whole by every token.
    "router/kernel": ("embed", None),
    "router/bias": (None,),
    "expert_gate/kernel": ("experts", "embed", "mlp"),
    "expert_up/kernel": ("experts", "embed", "mlp"),
    "expert_down/kernel": ("experts", "mlp", "embed"),
    "expert_gate/bias": ("experts", "mlp"),
    "expert_up/bias": ("experts", "mlp"),
    "expert_down/bias": ("experts", None),
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes MESH_AXES.

    Args:
      sizes: axis -> size, 1 where it is not named; one of them may be -1: all that are left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    given = int(np.prod([size for size in shape if size != -1]))
    shape = [len(devices) // given if size == -1 else size for size in shape]
    if int(np.prod(shape)) != len(devices):
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"{asked}: must multiply to the {len(devices)} devices there are, one of them may be -1")
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


@contextmanager
def use_mesh(mesh: Mesh):
    """Trace and run what is inside on this mesh, by RULES."""
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(tuple(RULES.items())))
        yield


def logical_axes(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    """The logical axes of the parameter, or optimizer moment, at this path.

    Raises:
      KeyError: a matrix that PARAMETER_AXES does not name.
    """
    layers = ("layers",) if any(part.startswith("run_") for part in path) else ()
    axes = PARAMETER_AXES.get("/".join(path[-2:]))
    if axes is None and ndim - len(layers) <= 1:
        return layers[:ndim] + (None,) * (ndim - len(layers[:ndim]))
    if axes is None:
        raise KeyError(f"no logical axes for the parameter {'/'.join(path)}: sharding.PARAMETER_AXES must name it")
    return layers + axes


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec that RULES give these logical axes; a dimension that its mesh axes do not divide stays whole."""
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = RULES.get(axis, ())
        divides = size % int(np.prod([mesh.shape[name] for name in mesh_axes])) == 0
        spec.append((mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]) if mesh_axes and divides else None)
    return PartitionSpec(*spec)


def _parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """For parameters, or a training state that holds trees like them: the same tree of NamedShardings."""

    def sharding(path, leaf):
        return NamedSharding(mesh, partition_spec(logical_axes(_parts(path), leaf.ndim), leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, tree)


def undivided(params: Any, mesh: Mesh) -> list[str]:
    """What stays whole because a mesh axis does not divide it, one line each, for the start-up report."""
    lines = []
    for path, leaf in jax.tree.leaves_with_path(params):
        axes = logical_axes(_parts(path), leaf.ndim)
        spec = partition_spec(axes, leaf.shape, mesh)
        for axis, size, placed in zip(axes, leaf.shape, spec, strict=True):
            over = [name for name in RULES.get(axis, ()) if mesh.shape[name] > 1]
            if over and placed is None:
                lines.append(f"{axis}={size} stays whole: not divisible by {' x '.join(over)}")
    return sorted(set(lines))


def batch_sharding(mesh: Mesh, leading: int) -> NamedSharding:
    """Of a batch whose sequences are dimension number `leading`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, RULES["batch"]))


def batch_parts(mesh: Mesh) -> int:
    """Into how many equal parts the mesh splits a batch."""
    return int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(number, count): which of `count` equal stretches of every batch this process reads.

    Processes whose devices differ only along axes that do not split the batch read the same stretch.
    """
    parts = batch_parts(mesh)
    held: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh, 0).devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    stretches = sorted({tuple(sorted(rows)) for rows in held.values()})
    return stretches.index(tuple(sorted(held[jax.process_index()]))), len(stretches)


def check_batch(key_name: str, batch_size: int, mesh: Mesh) -> None:
    """Raise ConfigError unless the mesh can split this many sequences."""
    parts = batch_parts(mesh)
    if batch_size % parts:
        right = f"must be a multiple of mesh {' x '.join(RULES['batch'])} = {parts}"
        raise ConfigError(f"{key_name}: {batch_size} sequences at a time, {right}")


def check_experts(num_experts: int, mesh: Mesh) -> None:
    """Raise ConfigError unless the mesh's expert axis can split this many experts."""
    size = mesh.shape["expert"]
    if size > 1 and (num_experts == 0 or num_experts % size):
        right = "a dense model has no experts to split" if num_experts == 0 else "must divide the number of experts"
        raise ConfigError(f"mesh.expert={size}: {right}, model.num_experts={num_experts}")
