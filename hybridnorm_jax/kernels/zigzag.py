"""The exchange that gives each of n devices the same share of causal attention over a sequence split among them.

Device i holds the i-th stretch of every sequence. Were it to compute that stretch, the last device would do twice the
mean. So the 2n half stretches of the queries are exchanged first: device i computes halves i and 2n - 1 - i. These two
see 2n + 1 halves of keys together, whatever i is.

All functions on arrays are for the inside of jax.shard_map.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from hybridnorm_jax.mesh.split_axes import Axes

Local = Shaped[Array, "batch local ..."]


class _Moves(NamedTuple):
    """(source, target) pairs of jax.lax.ppermute for the even ones of the 2n halves, and for the odd ones.

    Before the exchange the first half of every device is an even one, the second an odd one.
    """

    even: list[tuple[int, int]]
    odd: list[tuple[int, int]]


def zigzag(seq: int, shards: int) -> np.ndarray:
    """The position of every row when all devices' rows, after to_zigzag, stand one behind the other."""
    halves = np.arange(seq).reshape(2 * shards, -1)
    low, high = halves[:shards], halves[shards:]
    return np.stack([low, high[::-1]], axis=1).reshape(-1)


def to_zigzag(x: Local, axes: Axes) -> Local:
    """From this device's stretch of the sequence to its halves i and 2n - 1 - i."""
    moves = _moves(jax.lax.axis_size(axes))
    first, second = jnp.split(x, 2, axis=1)
    even = jax.lax.ppermute(first, axes, moves.even)
    odd = jax.lax.ppermute(second, axes, moves.odd)
    low_is_even = _low_is_even(axes)
    return jnp.concatenate([jnp.where(low_is_even, even, odd), jnp.where(low_is_even, odd, even)], axis=1)


def from_zigzag(x: Local, axes: Axes) -> Local:
    """The inverse of to_zigzag."""
    moves = _moves(jax.lax.axis_size(axes))
    low, high = jnp.split(x, 2, axis=1)
    low_is_even = _low_is_even(axes)
    even = jnp.where(low_is_even, low, high)
    odd = jnp.where(low_is_even, high, low)
    first = jax.lax.ppermute(even, axes, _reversed(moves.even))
    second = jax.lax.ppermute(odd, axes, _reversed(moves.odd))
    return jnp.concatenate([first, second], axis=1)


def gather_sequence(x: Local, axes: Axes) -> Shaped[Array, "batch seq ..."]:
    """The whole sequence."""
    return jax.lax.all_gather(x, axes, axis=1, tiled=True)


def _moves(shards: int) -> _Moves:
    def owner(half: int) -> int:
        return half if half < shards else 2 * shards - 1 - half

    return _Moves(
        even=[(device, owner(2 * device)) for device in range(shards)],
        odd=[(device, owner(2 * device + 1)) for device in range(shards)],
    )


def _reversed(moves: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(target, source) for source, target in moves]


def _low_is_even(axes: Axes) -> Array:
    """Whether half i of device i is an even one; half 2n - 1 - i then is an odd one."""
    return jax.lax.axis_index(axes) % 2 == 0
