"""Positions as a fixed table of sines and cosines that is added to the token embedding, as XGLM has them."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.precision import wide_dtype


def sinusoids(positions: Int[Array, "batch seq"], width: int, dtype: Any) -> Float[Array, "batch seq embed"]:
    """Row p of the table: [sin(p w_i), ..., cos(p w_i), ...], w_i = 10000^(-i / (half - 1)), i < half = width // 2.

    The last channel of an odd width is 0. Computed in float32 at least, and rounded to `dtype`. Attention Is All You
    Need (1706.03762), section 3.5, has sines and cosines in turns, and divides i by half.
    """
    half, wide = width // 2, wide_dtype(dtype)
    exponent = np.arange(half) * (math.log(10000) / (half - 1))
    angles = positions[..., None].astype(wide) * jnp.asarray(np.exp(-exponent), wide)
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, width % 2))).astype(dtype)
