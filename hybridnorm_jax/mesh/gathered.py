"""An array gathered inside a jax.shard_map, whose gradient is summed and scattered in stages.

Of a sum scattered over all 128 chips of a v5p slice at once the TPU compiler makes an all-reduce, which sends twice as
much and leaves the whole sum in memory; of sums over groups of up to 64 it makes reduce-scatters (libtpu 0.0.52).
"""

import functools
import math

import jax
from jaxtyping import Array

from hybridnorm_jax.mesh.split_axes import Axes

# Devices of a stage, at most.
LARGEST_STAGE = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(shard: Array, axes: Axes, dimension: int) -> Array:
    """The shards of all devices along `axes` one after the other, as jax.lax.all_gather(..., tiled=True)."""
    return jax.lax.all_gather(shard, axes, axis=dimension, tiled=True)


def scatter_sum(array: Array, axes: Axes, dimension: int) -> Array:
    """The transpose of gather: device number i along `axes` gets the i-th stretch of the sum over all of them."""
    for axis in axes:  # the first is the outermost: its devices share the longest stretches
        for groups in _stages(jax.lax.axis_size(axis), of_channels=dimension == array.ndim - 1):
            array = jax.lax.psum_scatter(array, axis, scatter_dimension=dimension, axis_index_groups=groups, tiled=True)
    return array


def _stages(devices: int, *, of_channels: bool) -> list[list[list[int]] | None]:
    """The groups of devices that sum in each stage; None: all together.

    With an outer and an inner stage, device a * inner + b gets in the first stretch a of `outer`, and in the second
    stretch b of that. Its groups are then neighbours in the second: on a v5p:4x4x8 the rings of eight.

    Args:
      of_channels: whether the last dimension is scattered. Then the first stage has the fewer devices: of one that
        leaves stretches of 128 channels the compiler makes an all-reduce.
    """
    inner = max((size for size in range(2, math.isqrt(devices) + 1) if devices % size == 0), default=1)
    if devices <= LARGEST_STAGE or inner == 1:
        return [None]
    outer = devices // inner
    if of_channels:
        outer, inner = inner, outer
    first = [[a * inner + b for a in range(outer)] for b in range(inner)]
    second = [[a * inner + b for b in range(inner)] for a in range(outer)]
    return [first, second]


def _forward(shard: Array, axes: Axes, dimension: int) -> tuple[Array, None]:
    return gather(shard, axes, dimension), None


def _backward(axes: Axes, dimension: int, _: None, d_gathered: Array) -> tuple[Array]:
    return (scatter_sum(d_gathered, axes, dimension),)


gather.defvjp(_forward, _backward)
