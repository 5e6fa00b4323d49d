"""The keys and values of the tokens that a model has read, which later tokens attend to.

A cache is the Flax collection CACHE, a plain tree of arrays: `layer_<i>/attention/cached_key` and `cached_value`, of
shape (batch, kv_heads, head_dim, slots) and in the compute dtype. A slot holds one token.
"""

from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from hybridnorm_jax.kernels.cached_attention import CachedHeads
from hybridnorm_jax.mesh.split_axes import split_axes
from hybridnorm_jax.model.config import ModelConfig

CACHE = "cache"


@flax.struct.dataclass
class Slots:
    """Where new tokens go in the cache, and which slots hold no token of a sequence.

    Attributes:
      next: the slot of the first new token; all slots before it are filled.
      first: the first slot of each sequence. Sequences end in the same slot, so shorter ones begin later.
    """

    next: Int[Array, ""]
    first: Int[Array, " batch"]


def empty_cache(config: ModelConfig, *, batch: int, slots: int) -> dict[str, Any]:
    """A cache of zeros: batch * slots * kv_heads * head_dim * 2 * layers numbers of the compute dtype."""

    def of_layer() -> dict[str, Any]:
        shape = (batch, config.num_kv_heads, config.head_dim, slots)
        zeros = {name: in_place(jnp.zeros(shape, config.dtype)) for name in ("cached_key", "cached_value")}
        return {"attention": zeros}

    return {f"layer_{number}": of_layer() for number in range(config.num_layers)}


def bytes_of_cache(config: ModelConfig, *, batch: int, slots: int) -> int:
    """What `empty_cache` takes of memory, on all devices together."""
    cache = jax.eval_shape(partial(empty_cache, config, batch=batch, slots=slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def in_place(heads: CachedHeads) -> CachedHeads:
    """Cached keys or values where and as they lie in every step, so that none of them moves between steps.

    On the mesh in force they are split over batch and heads, as far as it divides these. In memory they lie in the
    order of their axes; XLA for TPUs would rather put the slots before heads and channels, and copy all of the cache
    before and after the loop.
    """
    batch, kv_heads, _, _ = heads.shape
    axes = split_axes("batch", batch), split_axes("kv_heads", kv_heads)
    if not any(axes):
        return _in_order(heads)
    spec = PartitionSpec(axes[0] or None, axes[1] or None)
    # On every device its own part: XLA cannot split what asks for an order, and would fetch all parts for it.
    return jax.shard_map(_in_order, in_specs=spec, out_specs=spec)(heads)


def _in_order(heads: CachedHeads) -> CachedHeads:
    return with_layout_constraint(heads, Layout(tuple(range(heads.ndim))))
