"""Causal attention in plain JAX, block by block, on any platform; and statistics of its weights."""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.names import SAVED

Heads = Float[Array, "batch seq heads head_dim"]
KeyValueHeads = Float[Array, "batch seq kv_heads head_dim"]
SegmentIds = Int[Array, "batch seq"] | None

# ---- xla: queries in blocks, each against the keys up to its end. The backward pass recomputes the weights from the
# ---- logarithm of their denominator (FlashAttention, 2205.14135) in blocks of keys, each against the queries from its
# ---- start on. So only d_query is summed over blocks, and only its product contracts the first dimension of a block of
# ---- scores, at which XLA's CPU backend has half its speed.


def _blocks(seq: int) -> list[tuple[int, int]]:
    """(start, stop) of at most 8 blocks: small ones waste less above the diagonal, many take long to compile."""
    size = 64 if seq <= 256 else 128 * math.ceil(seq / 1024)
    return [(start, min(start + size, seq)) for start in range(0, seq, size)]


def _heads_first(x: KeyValueHeads, heads: int) -> Float[Array, "batch heads seq head_dim"]:
    """Heads before positions, each repeated for the query heads that read it."""
    return jnp.repeat(x.swapaxes(1, 2), heads // x.shape[2], axis=1)


def _einsum(dtype: Any):
    return functools.partial(jnp.einsum, preferred_element_type=jnp.promote_types(dtype, jnp.float32))


def _mask(scores, segment_ids: SegmentIds, rows: tuple[int, int], columns: tuple[int, int], order):
    """The scores of these rows and columns, -inf where `order(row, column)` fails or the segments differ."""
    visible = order(jnp.arange(*rows)[:, None], jnp.arange(*columns))
    if segment_ids is not None:
        row_ids, column_ids = segment_ids[:, None, slice(*rows), None], segment_ids[:, None, None, slice(*columns)]
        visible = visible & (row_ids == column_ids)
    return jnp.where(visible, scores, -jnp.inf)


def attention_statistics(
    query: Heads, key: KeyValueHeads, segment_ids: SegmentIds = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(entropy, largest logit) of the weights that causal_attention computes, in float32 at least; no gradient.

    With logits z = q k^T / sqrt(head_dim) and weights p = softmax(z) over the keys that a query sees: the entropy
    -sum_k p log p in nats, mean over batch, heads and queries, and the largest z of all. Where every weight is alike
    the entropy of query i (from 0), without segments, is log(i + 1).
    """
    query, key = jax.lax.stop_gradient((query, key))
    einsum, scale = _einsum(query.dtype), query.shape[-1] ** -0.5
    q, k = (_heads_first(x, query.shape[2]) for x in (query, key))
    entropies, largest = [], []
    for start, stop in _blocks(q.shape[2]):
        scores = scale * einsum("bhqd,bhkd->bhqk", q[:, :, start:stop], k[:, :, :stop])
        scores = _mask(scores, segment_ids, (start, stop), (0, stop), operator.ge)
        log_weights = jax.nn.log_softmax(scores)
        seen = jnp.where(jnp.isneginf(scores), 0, log_weights)  # 0 log 0 is 0
        entropies.append(-(jnp.exp(log_weights) * seen).sum((0, 1, 3)))
        largest.append(scores.max())
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    return jnp.concatenate(entropies).sum() / rows, jnp.stack(largest).max()


@jax.custom_vjp
def blockwise_attention(query: Heads, key: KeyValueHeads, value: KeyValueHeads, segment_ids: SegmentIds) -> Heads:
    """kernels.attention.causal_attention, whole sequences on one device or split by batch and heads alone.

    Queries go in blocks, each against the keys up to its end. The backward pass recomputes the weights from the
    logarithm of their denominator (FlashAttention, 2205.14135).
    """
    return _forward(query, key, value, segment_ids)[0]


def _forward(query, key, value, segment_ids):
    heads, einsum, scale = query.shape[2], _einsum(query.dtype), query.shape[-1] ** -0.5
    q, k, v = (_heads_first(x, heads) for x in (query, key, value))
    contexts, log_totals = [], []
    for start, stop in _blocks(q.shape[2]):
        if contexts:
            # One block after the other: XLA for TPU otherwise holds the scores of all of them at once.
            q, contexts[-1] = jax.lax.optimization_barrier((q, contexts[-1]))
        scores = scale * einsum("bhqd,bhkd->bhqk", q[:, :, start:stop], k[:, :, :stop])
        scores = _mask(scores, segment_ids, (start, stop), (0, stop), operator.ge)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        contexts.append(einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[:, :, :stop]) / total)
        log_totals.append((highest + jnp.log(total))[..., 0])
    context = jnp.concatenate(contexts, axis=2).swapaxes(1, 2).astype(query.dtype)
    context, log_total = checkpoint_name((context, jnp.concatenate(log_totals, axis=2)), SAVED)
    return context, (query, key, value, segment_ids, context, log_total)


def _backward(residuals, d_context):
    query, key, value, segment_ids, context, log_total = residuals
    heads, einsum, scale = query.shape[2], _einsum(query.dtype), query.shape[-1] ** -0.5
    q, k, v, d_c = (_heads_first(x, heads) for x in (query, key, value, d_context))
    seq, log_total = q.shape[2], log_total[:, :, None]
    # What softmax's derivative subtracts in each row: sum_k weight d_weight = context . d_context.
    inner = jnp.einsum("bqhd,bqhd->bhq", context, d_context, preferred_element_type=log_total.dtype)[:, :, None]
    d_query, d_keys, d_values = jnp.zeros_like(q, log_total.dtype), [], []
    for start, stop in _blocks(seq):
        q, d_query = jax.lax.optimization_barrier((q, d_query))
        k_block, q_rest, d_rest = k[:, :, start:stop], q[:, :, start:], d_c[:, :, start:]
        scores = scale * einsum("bhkd,bhqd->bhkq", k_block, q_rest)
        scores = _mask(scores, segment_ids, (start, stop), (start, seq), operator.le)
        weights = jnp.exp(scores - log_total[..., start:])
        d_weights = einsum("bhkd,bhqd->bhkq", v[:, :, start:stop], d_rest)
        d_scores = (scale * weights * (d_weights - inner[..., start:])).astype(q.dtype)
        d_values.append(einsum("bhkq,bhqd->bhkd", weights.astype(d_rest.dtype), d_rest))
        d_keys.append(einsum("bhkq,bhqd->bhkd", d_scores, q_rest))
        d_query = d_query.at[:, :, start:].add(einsum("bhkq,bhkd->bhqd", d_scores, k_block))
    d_query = d_query.swapaxes(1, 2).astype(query.dtype)
    return d_query, _sum_readers(d_keys, key), _sum_readers(d_values, value), None


def _sum_readers(blocks: list[Float[Array, "batch heads block head_dim"]], like: KeyValueHeads) -> KeyValueHeads:
    """The gradient of _heads_first: blocks joined, and summed over the query heads that read each key head."""
    joined = jnp.concatenate(blocks, axis=2).swapaxes(1, 2)
    batch, seq, kv_heads, head_dim = like.shape
    if joined.shape != like.shape:
        joined = joined.reshape(batch, seq, kv_heads, -1, head_dim).sum(3)
    return joined.astype(like.dtype)


blockwise_attention.defvjp(_forward, _backward)
