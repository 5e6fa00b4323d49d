"""Moments that are kept in bfloat16, rounded at random so that small changes are not lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int

from hybridnorm_jax.training.optimizers.schedules import StepNumbers

# Keeps these random numbers apart from those of dropout, which come from the same key.
_MOMENTS = 0x6D6F6D65


class RoundedMoments(NamedTuple):
    """The state of another transformation, all of its arrays of floats in bfloat16.

    Attributes:
      count: updates made.
      state: as named.
    """

    count: Int[Array, ""]
    state: Any


def in_bfloat16(inner: optax.GradientTransformation, numbers: StepNumbers) -> optax.GradientTransformation:
    """`inner` with moments in bfloat16. It computes as before; only what it remembers is rounded.

    A moment that decays by 0.999 changes by less than the 0.4 % between two bfloat16 numbers: rounded to the nearest,
    it would stand still. Rounded at random it changes in the mean as it should. The random numbers follow from the
    run's seed and the number of the update, so that a run that was stopped goes on with the same ones, on any mesh.
    """

    def init(params: Any) -> RoundedMoments:
        return RoundedMoments(jnp.zeros((), jnp.int32), jax.tree.map(_narrow, inner.init(params)))

    def update(gradients: Any, state: RoundedMoments, params: Any = None) -> tuple[Any, RoundedMoments]:
        kinds = jax.eval_shape(inner.init, params)
        wide = jax.tree.map(lambda leaf, kind: leaf.astype(kind.dtype), state.state, kinds)
        directions, after = inner.update(gradients, wide, params)
        key = jax.random.fold_in(jax.random.wrap_key_data(numbers.dropout_seed), _MOMENTS)
        key = jax.random.fold_in(key, state.count)
        leaves, structure = jax.tree.flatten(after)
        rounded = [
            round_at_random(leaf, jax.random.fold_in(key, number)) if _is_moment(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ]
        return directions, RoundedMoments(optax.safe_increment(state.count), jax.tree.unflatten(structure, rounded))

    return optax.GradientTransformation(init, update)


def round_at_random(x: Float[Array, "*shape"], key: Array) -> BFloat16[Array, "*shape"]:
    """One of the two bfloat16 numbers beside each number: the mean over many keys is x, as float32.

    The nearer one is the likelier: random bits are added to the 16 that bfloat16 has not, and the sum is cut off.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.shift_right_logical(bits + noise, jnp.uint32(16)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(cut, jnp.bfloat16)


def _is_moment(leaf: Array) -> bool:
    return leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _narrow(leaf: Array) -> Array:
    return leaf.astype(jnp.bfloat16) if _is_moment(leaf) else leaf
