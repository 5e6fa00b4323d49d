"""The dtype in which sums run."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def wide_dtype(dtype: Any) -> Any:
    """This dtype, or float32 where it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: Any) -> Array:
    """The array in its wide_dtype."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x.dtype))


def wide_einsum(spec: str, a: Array, b: Array) -> Array:
    """einsum of two arrays of one dtype, accumulated and returned in wide_dtype."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide_dtype(a.dtype))
