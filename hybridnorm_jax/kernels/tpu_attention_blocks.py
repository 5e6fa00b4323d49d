"""What the two kernels of tpu_attention.py share: their arrays, and what they compute of one block of positions.

Positions lie along the lanes, channels along the sublanes. So norms and the rotation work across sublanes, the
softmax's statistics are rows, and heads of 64 channels fill whole tiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.head_preparation import HeadNorm

LANES = 128


class KernelInputs(NamedTuple):
    """Arrays of one device; in a kernel, references to one key head's share of them.

    Attributes:
      query, key, value: as projected; heads that read the same keys follow each other.
      segment_ids: of each position, or None.
      cos, sin: of the rotation, in float32, or None; `rows` is batch, or 1 where all sequences have the same.
      query_norm, key_norm, value_norm: scale and bias as columns (head_dim, 1), each or the norm None.
    """

    query: Float[Array, "batch heads head_dim seq"]
    key: Float[Array, "batch kv_heads head_dim seq"]
    value: Float[Array, "batch kv_heads head_dim seq"]
    segment_ids: Int[Array, "batch 1 seq"] | None
    cos: Float[Array, "rows half seq"] | None
    sin: Float[Array, "rows half seq"] | None
    query_norm: HeadNorm | None
    key_norm: HeadNorm | None
    value_norm: HeadNorm | None


def positions(index: Any, block: int) -> Any:
    """The slice of block number `index`."""
    return pl.ds(pl.multiple_of(index * block, block), block)


def normalized(x: Float[Array, "head_dim seq"], norm: HeadNorm | None) -> Float[Array, "head_dim seq"]:
    """x in float32, after its norm; the norm's parameters are references or arrays, columns (head_dim, 1)."""
    x = x.astype(jnp.float32)
    if norm is None:
        return x
    scale = None if norm.scale is None else norm.scale[...]
    bias = None if norm.bias is None else norm.bias[...]
    return norm.function(x, scale, bias, eps=norm.epsilon, axis=0)


def rotated(
    x: Float[Array, "head_dim seq"], cos: Any, sin: Any, columns: Any, *, back: bool = False
) -> Float[Array, "head_dim seq"]:
    """RoPE of these positions, or its transpose; cos and sin are references, None where nothing rotates."""
    if cos is None:
        return x
    half = cos.shape[0]
    cosines, sines = cos[:, columns], sin[:, columns]
    if back:
        sines = -sines
    first, second = x[:half], x[half : 2 * half]
    parts = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(parts if 2 * half == x.shape[0] else [*parts, x[2 * half :]], axis=0)


def keep_columns_of_ids(ids: Any, columns_of_ids: Any, block: int) -> None:
    """Write the segment ids of a row into the first column of (seq, LANES), so that keys can be compared."""

    def one(index: Any, _: None) -> None:
        row = jnp.broadcast_to(ids[:, positions(index, block)], (LANES, block))
        columns_of_ids[positions(index, block), :] = row.T

    jax.lax.fori_loop(0, ids.shape[-1] // block, one, None)


def scores(
    keys: Float[Array, "key head_dim"],
    queries: Float[Array, "head_dim query"],
    *,
    key_ids: Int[Array, "key 1"] | None,
    query_ids: Int[Array, "1 query"] | None,
    diagonal: bool,
) -> Float[Array, "key query"]:
    """Products of keys and queries in float32, -inf where the query does not see the key.

    Args:
      diagonal: keys and queries are of the same positions, otherwise the keys are earlier.
    """
    products = dot(keys, queries)
    visible = None
    if diagonal:
        key_positions = jax.lax.broadcasted_iota(jnp.int32, products.shape, 0)
        visible = key_positions <= jax.lax.broadcasted_iota(jnp.int32, products.shape, 1)
    if key_ids is not None:
        same = key_ids == query_ids
        visible = same if visible is None else visible & same
    return products if visible is None else jnp.where(visible, products, -jnp.inf)


def dot(left: Array, right: Array, *, transposed: bool = False) -> Array:
    """left @ right, or left @ right.T, summed in float32; float32 operands are multiplied as such."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def each_block(seq: int, block: int, work: Callable[[Any], None]) -> None:
    """work(index) for every block, in order."""

    def one(index: Any, _: None) -> None:
        work(index)

    jax.lax.fori_loop(0, seq // block, one, None)
