"""Causal attention on TPUs: by our own kernel where a core holds a head, otherwise by JAX's splash attention.

Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) has sequences that a mesh splits, and longer ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, Heads, SegmentIds
from hybridnorm_jax.kernels.attention_on_mesh import on_mesh, sequence_axes
from hybridnorm_jax.kernels.backend_names import SPLASH_TILE as TILE
from hybridnorm_jax.kernels.head_preparation import Preparation, prepared
from hybridnorm_jax.kernels.tpu_attention import fits, tpu_attention
from hybridnorm_jax.kernels.zigzag import from_zigzag, gather_sequence, to_zigzag, zigzag
from hybridnorm_jax.mesh.split_axes import Axes, parts, split_axes


def splash_attention(inputs: AttentionInputs, preparation: Preparation, *, scale: float, saved_as: str) -> Heads:
    """softmax_attention; on a mesh once per device, on its share of sequences, heads and positions.

    Args:
      preparation: norms and rotation of the heads.
      scale: factor of q k^T.
      saved_as: checkpoint name of what the backward pass needs besides query, key and value.

    Raises:
      ValueError: the sequence is split among n devices, and its length is no multiple of 2 n * 128.
    """
    _, seq, _, head_dim = inputs.query.shape
    on_one_device = jax.sharding.get_abstract_mesh().empty
    axes = () if on_one_device else sequence_axes(seq)
    if not axes and fits(seq=seq, head_dim=head_dim, dtype=inputs.query.dtype):
        return tpu_attention(inputs, preparation, scale=scale, saved_as=saved_as)
    inputs = prepared(inputs, preparation)
    inputs = inputs._replace(query=_scaled(inputs.query, scale))
    if on_one_device:
        return _whole(inputs, saved_as=saved_as)
    if not axes:
        return on_mesh(functools.partial(_whole, saved_as=saved_as), inputs)
    return _in_shares(inputs, axes, saved_as)


def _in_shares(inputs: AttentionInputs, axes: Axes, saved_as: str) -> Heads:
    """The attention of a sequence that these axes split, see zigzag.py."""
    seq, heads, shards = inputs.query.shape[1], inputs.query.shape[2], parts(axes)
    if seq % (2 * shards * TILE):
        raise ValueError(f"{seq} positions on {shards} devices: splash needs a multiple of {2 * shards * TILE}")
    mask = splash.CausalMask((seq, seq))
    mask.q_sequence = zigzag(seq, shards).astype(np.int32)
    kernel = _make_kernel(
        mask,
        heads=heads // parts(split_axes("heads", heads)),
        seq=seq // (2 * shards),
        saved_as=saved_as,
        q_seq_shards=shards,
    )
    # The kernel is a tree of arrays that say which blocks of keys a row of blocks sees; each device has its own rows.
    rows = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, axes))
    return on_mesh(
        functools.partial(_share, axes=axes),
        inputs,
        sequence=axes,
        kernel=kernel,
        kernel_specs=kernel.manual_sharding_spec(rows),
    )


def _make_kernel(mask: splash.Mask, *, heads: int, seq: int, saved_as: str, q_seq_shards: int = 1) -> Any:
    """The kernel for this mask; blocks divide `seq`, a multiple of TILE."""
    block = next(size for size in (512, 256, TILE) if seq % size == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=q_seq_shards,
        residual_checkpoint_name=saved_as,
    )


def _whole(inputs: AttentionInputs, *, saved_as: str) -> Heads:
    """All positions on one device. They are filled up to a multiple of TILE at the end, which no token sees."""
    _, seq, heads, _ = inputs.query.shape
    padding = -seq % TILE
    padded = seq + padding
    kernel = _make_kernel(splash.CausalMask((padded, padded)), heads=heads, seq=padded, saved_as=saved_as)

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))

    query, key, value = pad(inputs.query), pad(inputs.key), pad(inputs.value)
    ids = None if inputs.segment_ids is None else jnp.pad(inputs.segment_ids, ((0, 0), (0, padding)))
    return _apply(kernel, AttentionInputs(query, key, value, ids), query_ids=ids)[:, :seq]


def _share(kernel: Any, inputs: AttentionInputs, *, axes: Axes) -> Heads:
    """Inside jax.shard_map: one device's share of the positions."""
    query = to_zigzag(inputs.query, axes)
    key, value = gather_sequence(inputs.key, axes), gather_sequence(inputs.value, axes)
    query_ids = key_ids = None
    if inputs.segment_ids is not None:
        query_ids = to_zigzag(inputs.segment_ids, axes)
        key_ids = gather_sequence(inputs.segment_ids, axes)
    return from_zigzag(_apply(kernel, AttentionInputs(query, key, value, key_ids), query_ids=query_ids), axes)


def _scaled(query: Heads, scale: float) -> Heads:
    return (query * jnp.float32(scale)).astype(query.dtype)


def _apply(kernel: Any, inputs: AttentionInputs, *, query_ids: SegmentIds) -> Heads:
    """The kernel on every sequence; the segment ids of `inputs` are the keys'."""
    q, k, v = inputs.query.swapaxes(1, 2), inputs.key.swapaxes(1, 2), inputs.value.swapaxes(1, 2)
    ids = None if query_ids is None else splash.SegmentIds(q=query_ids, kv=inputs.segment_ids)
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)
