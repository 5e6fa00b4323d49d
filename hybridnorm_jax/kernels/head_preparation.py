"""What happens to the heads of q, k and v between their projections and their products: norms per head, and RoPE.

It is data for whoever computes attention: the kernel for TPUs does it on the way in, everybody else before.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads

Rotation = tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale", "bias"], meta_fields=["function", "epsilon"])
@dataclasses.dataclass(frozen=True)
class HeadNorm:
    """A norm of each head.

    Attributes:
      scale, bias: of shape (head_dim,), or None.
      function: model.norm_functions.rms_norm or layer_norm.
      epsilon: inside its root.
    """

    scale: Float[Array, " head_dim"] | None
    bias: Float[Array, " head_dim"] | None
    function: Callable[..., Array]
    epsilon: float

    def __call__(self, x: Heads) -> Heads:
        return self.function(x, self.scale, self.bias, eps=self.epsilon)


class Preparation(NamedTuple):
    """Norms and rotation of the heads; a norm stands before the rotation. None: there is none.

    Attributes:
      query, key, value: the norms.
      rotation: cos and sin for q and k, see rotate.
    """

    query: HeadNorm | None = None
    key: HeadNorm | None = None
    value: HeadNorm | None = None
    rotation: Rotation | None = None


def prepared(inputs: AttentionInputs, preparation: Preparation) -> AttentionInputs:
    """The inputs with their norms and their rotation applied."""
    query, key, value, segment_ids = inputs
    norms = (preparation.query, preparation.key, preparation.value)
    if any(norm is not None for norm in norms):
        # XLA for TPUs would copy them in float32 into another layout for the norms (1.18B, v6e: 4 % of all bytes).
        query, key, value = jax.lax.optimization_barrier((query, key, value))
    query, key, value = (x if norm is None else norm(x) for x, norm in zip((query, key, value), norms, strict=True))
    if preparation.rotation is not None:
        query, key = rotate(query, preparation.rotation), rotate(key, preparation.rotation)
    return AttentionInputs(query, key, value, segment_ids)


def rotate(x: Heads, by: Rotation) -> Heads:
    """RoPE on the leading 2 * half channels, channel i paired with i + half; the rest passes unchanged.

    It is linear in x, and its transpose is the rotation back, which is how it is differentiated in reverse mode. The
    positions have no gradient.
    """
    half = by[0].shape[-1]
    rotated, passed = x[..., : 2 * half], x[..., 2 * half :]
    rotated = _rotate(rotated, by)
    return rotated if passed.shape[-1] == 0 else jnp.concatenate([rotated, passed], axis=-1)


@jax.custom_vjp
def _rotate(x: Array, by: Rotation) -> Array:
    """[first, second] * [cos, cos] + [second, first] * [-sin, sin], the halves of the channels."""
    cos, sin = by
    swapped = jax.lax.platform_dependent(x, tpu=_swapped_by_slicing, default=_swapped)
    whole_cos, signed_sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (x.astype(cos.dtype) * whole_cos + swapped.astype(cos.dtype) * signed_sin).astype(x.dtype)


def _rotate_forward(x: Array, by: Rotation) -> tuple[Array, Rotation]:
    return _rotate(x, by), by


def _rotate_backward(by: Rotation, gradient: Array) -> tuple[Array, None]:
    cos, sin = by
    return _rotate(gradient, (cos, -sin)), None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _swapped(x: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([second, first], axis=-1)


def _swapped_by_slicing(x: Array) -> Array:
    """As _swapped; XLA for TPUs writes halves out before it puts them together, and this it does not."""
    half = x.shape[-1] // 2
    return jnp.concatenate([x, x], axis=-1)[..., half:-half]
