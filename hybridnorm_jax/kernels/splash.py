"""Causal attention by the kernel in jax.experimental.pallas.ops.tpu.splash_attention, on one TPU or on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.names import SPLASH_TILE as TILE
from hybridnorm_jax.kernels.split_sequence import Axes, from_zigzag, gather, on_mesh, sequence_axes, to_zigzag, zigzag
from hybridnorm_jax.mesh.logical_axes import parts, split_axes

Heads = Float[Array, "batch seq heads head_dim"]
KeyValueHeads = Float[Array, "batch seq kv_heads head_dim"]
SegmentIds = Int[Array, "batch seq"] | None

_BLOCKS = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
_BLOCKS += ("block_q_dq", "block_kv_dq")


def splash_attention(
    query: Heads, key: KeyValueHeads, value: KeyValueHeads, segment_ids: SegmentIds, *, saved_as: str
) -> Heads:
    """kernels.attention.causal_attention; on a mesh once per device, on its share of sequences, heads, positions.

    Args:
      saved_as: checkpoint name of what the backward pass needs besides query, key and value.

    Raises:
      ValueError: the sequence is split among n devices, and its length is no multiple of 2 n * 128.
    """
    seq = query.shape[1]
    if jax.sharding.get_abstract_mesh().empty:
        return _whole(query, key, value, segment_ids, saved_as=saved_as)
    axes = sequence_axes(seq)
    if not axes:
        return on_mesh(functools.partial(_whole, saved_as=saved_as), query, key, value, segment_ids)
    shards = parts(axes)
    if seq % (2 * shards * TILE):
        raise ValueError(f"{seq} positions on {shards} devices: splash needs a multiple of {2 * shards * TILE}")
    local_heads = query.shape[2] // parts(split_axes("heads", query.shape[2]))
    mask = splash.CausalMask((seq, seq))
    mask.q_sequence = zigzag(seq, shards).astype(np.int32)
    kernel = _kernel(mask, local_heads, seq // (2 * shards), saved_as, q_seq_shards=shards)
    # The kernel is a tree of arrays that say which blocks of keys a row of blocks sees; each device has its own rows.
    spec = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, axes)))
    local = functools.partial(_share, axes=axes)
    return on_mesh(local, query, key, value, segment_ids, sequence=axes, before=((kernel, spec),))


def _kernel(mask: splash.Mask, heads: int, seq: int, saved_as: str, q_seq_shards: int = 1):
    """The kernel for this mask; blocks divide `seq`, a multiple of TILE."""
    block = next(size for size in (512, 256, TILE) if seq % size == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(_BLOCKS, block)),
        head_shards=1,
        q_seq_shards=q_seq_shards,
        residual_checkpoint_name=saved_as,
    )


def _scaled(query: Heads) -> Heads:
    return (query * jnp.float32(query.shape[-1] ** -0.5)).astype(query.dtype)


def _whole(query: Heads, key: KeyValueHeads, value: KeyValueHeads, segment_ids: SegmentIds, *, saved_as: str) -> Heads:
    """All positions on one device. They are filled up to a multiple of TILE at the end, which no token sees."""
    seq, heads = query.shape[1:3]
    padding = -seq % TILE
    kernel = _kernel(splash.CausalMask((seq + padding,) * 2), heads, seq + padding, saved_as)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (_scaled(query), key, value))
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, padding)))
    return _apply(kernel, q, k, v, ids, ids)[:, :seq]


def _share(kernel, query: Heads, key: KeyValueHeads, value: KeyValueHeads, segment_ids: SegmentIds, *, axes: Axes):
    """One device's share of the positions, see split_sequence.py."""
    q, k, v = to_zigzag(_scaled(query), axes), gather(key, axes), gather(value, axes)
    if segment_ids is None:
        return from_zigzag(_apply(kernel, q, k, v, None, None), axes)
    ids = to_zigzag(segment_ids, axes), gather(segment_ids, axes)
    return from_zigzag(_apply(kernel, q, k, v, *ids), axes)


def _apply(kernel, q: Heads, k: KeyValueHeads, v: KeyValueHeads, q_ids: SegmentIds, k_ids: SegmentIds) -> Heads:
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    ids = () if q_ids is None else (splash.SegmentIds(q_ids, k_ids),)
    return jax.vmap(kernel)(*heads_first, *ids).swapaxes(1, 2)
