"""The device mesh: making one, computing on it, counting its parts."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
from flax import linen as nn
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from hybridnorm_jax.config_fields import check_choice
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.mesh.sharding_rules import MESH_AXES, RULES, Rules


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes MESH_AXES; on TPUs of several slices `replica` lies across the slices.

    Args:
      sizes: axis -> size, 1 where it is not named; one of them may be -1: all that are left.
      devices: by default all there are.

    Raises:
      ConfigError: an axis that there is not; the sizes do not multiply to the number of devices, or replica is no
        multiple of the slices.
    """
    for axis in sizes:
        check_choice("mesh", axis, MESH_AXES)
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    given = math.prod(size for size in shape if size != -1)
    shape = [len(devices) // given if size == -1 else size for size in shape]
    if math.prod(shape) != len(devices):
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"{asked}: must multiply to the {len(devices)} devices there are, one of them may be -1")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return _mesh_of_one_slice(shape, devices)
    return _mesh_across_slices(shape, devices, slices)


@contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Trace and run what is inside on this mesh, by the first entries of these rules."""
    first_entries = [(name, entries[0]) for name, entries in rules.items() if entries]
    with jax.set_mesh(mesh), nn.logical_axis_rules(first_entries):
        yield


def parts_of(axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts these axes of the mesh split a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes)


_AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)


def _mesh_of_one_slice(shape: list[int], devices: list[jax.Device]) -> Mesh:
    try:
        return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=_AXIS_TYPES, devices=devices)
    except NotImplementedError:  # no axis of the torus has such a size: one has to be split
        split = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, MESH_AXES, axis_types=_AXIS_TYPES)


def _mesh_across_slices(shape: list[int], devices: list[jax.Device], slices: int) -> Mesh:
    replica, *others = shape
    if replica % slices:
        right = f"must be a multiple of the {slices} slices, between which the network is slow"
        raise ConfigError(f"mesh.replica={replica}: {right}")
    within = [replica // slices, *others]
    across = [slices] + [1] * len(others)
    return Mesh(create_hybrid_device_mesh(within, across, devices), MESH_AXES, axis_types=_AXIS_TYPES)
