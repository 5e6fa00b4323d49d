"""Causal attention in plain JAX, block by block, on any platform; and statistics of its weights.

The forward pass takes the queries in blocks, each against the keys up to the block's end. The backward pass recomputes
the weights from the logarithm of their denominator (FlashAttention, 2205.14135). It takes the keys in blocks, each
against the queries from the block's start on. So only the queries' gradient is summed over blocks. Its product is also
the only one that contracts the first dimension of a block of scores, at which XLA's CPU backend has half its speed.
"""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.attention_arrays import (
    AttentionInputs,
    AttentionResiduals,
    Heads,
    KeyValueHeads,
    SegmentIds,
)
from hybridnorm_jax.kernels.backend_names import SAVED
from hybridnorm_jax.kernels.precision import wide_einsum


class AttentionStatistics(NamedTuple):
    """Statistics of attention's weights over a batch.

    Attributes:
      entropy: of the weights, in nats, mean over batch, heads and queries.
      largest_logit: of all.
    """

    entropy: Float[Array, ""]
    largest_logit: Float[Array, ""]


def attention_statistics(query: Heads, key: KeyValueHeads, segment_ids: SegmentIds = None) -> AttentionStatistics:
    """Statistics of the weights that causal_attention computes, in float32 at least; they have no gradient.

    The logits are z = q k^T / sqrt(head_dim), the weights p = softmax(z) over the keys that a query sees, the entropy
    of a query -sum_k p log p. Where all weights of query i (from 0) are equal, its entropy is log(i + 1), if there are
    no segments.
    """
    query, key = jax.lax.stop_gradient((query, key))
    scale = query.shape[-1] ** -0.5
    q, k = _heads_first(query, query.shape[2]), _heads_first(key, query.shape[2])
    entropies, largest = [], []
    for rows in _blocks(q.shape[2]):
        columns = slice(0, rows.stop)
        scores = scale * wide_einsum("bhqd,bhkd->bhqk", q[:, :, rows], k[:, :, columns])
        scores = _hide_unseen(scores, segment_ids, rows=rows, columns=columns, sees=operator.ge)
        log_weights = jax.nn.log_softmax(scores)
        seen = jnp.where(jnp.isneginf(scores), 0, log_weights)  # 0 log 0 is 0
        entropies.append(-(jnp.exp(log_weights) * seen).sum((0, 1, 3)))
        largest.append(scores.max())
    queries = q.shape[0] * q.shape[1] * q.shape[2]
    return AttentionStatistics(
        entropy=jnp.concatenate(entropies).sum() / queries,
        largest_logit=jnp.stack(largest).max(),
    )


@jax.custom_vjp
def blockwise_attention(inputs: AttentionInputs) -> Heads:
    """causal_attention of whole sequences: on one device, or split by batch and heads alone."""
    context, _ = _forward(inputs)
    return context


def _blocks(seq: int) -> list[slice]:
    """At most 8 blocks of positions: small ones waste less above the diagonal, many take long to compile."""
    size = 64 if seq <= 256 else 128 * math.ceil(seq / 1024)
    return [slice(start, min(start + size, seq)) for start in range(0, seq, size)]


def _heads_first(x: KeyValueHeads, heads: int) -> Float[Array, "batch heads seq head_dim"]:
    """Heads before positions, each repeated for the query heads that read it."""
    return jnp.repeat(x.swapaxes(1, 2), heads // x.shape[2], axis=1)


def _hide_unseen(
    scores: Float[Array, "batch heads rows columns"],
    segment_ids: SegmentIds,
    *,
    rows: slice,
    columns: slice,
    sees: Callable[[Array, Array], Array],
) -> Float[Array, "batch heads rows columns"]:
    """The scores, but -inf where `sees(row, column)` is false or where the two lie in different segments."""
    visible = sees(jnp.arange(rows.start, rows.stop)[:, None], jnp.arange(columns.start, columns.stop))
    if segment_ids is not None:
        row_ids = segment_ids[:, None, rows, None]
        column_ids = segment_ids[:, None, None, columns]
        visible = visible & (row_ids == column_ids)
    return jnp.where(visible, scores, -jnp.inf)


def _forward(inputs: AttentionInputs) -> tuple[Heads, AttentionResiduals]:
    heads, scale = inputs.query.shape[2], inputs.query.shape[-1] ** -0.5
    q, k, v = _heads_first(inputs.query, heads), _heads_first(inputs.key, heads), _heads_first(inputs.value, heads)
    contexts, log_totals = [], []
    for rows in _blocks(q.shape[2]):
        if contexts:
            # One block after the other: XLA for TPU otherwise holds the scores of all of them at once.
            q, contexts[-1] = jax.lax.optimization_barrier((q, contexts[-1]))
        columns = slice(0, rows.stop)
        scores = scale * wide_einsum("bhqd,bhkd->bhqk", q[:, :, rows], k[:, :, columns])
        scores = _hide_unseen(scores, inputs.segment_ids, rows=rows, columns=columns, sees=operator.ge)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        contexts.append(wide_einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[:, :, columns]) / total)
        log_totals.append((highest + jnp.log(total))[..., 0])
    context = jnp.concatenate(contexts, axis=2).swapaxes(1, 2).astype(inputs.query.dtype)
    context, log_total = checkpoint_name((context, jnp.concatenate(log_totals, axis=2)), SAVED)
    return context, AttentionResiduals(inputs, context, log_total)


def _backward(residuals: AttentionResiduals, d_context: Heads) -> tuple[AttentionInputs]:
    query, key, value, segment_ids = residuals.inputs
    heads, scale = query.shape[2], query.shape[-1] ** -0.5
    q, k, v = _heads_first(query, heads), _heads_first(key, heads), _heads_first(value, heads)
    d_c = _heads_first(d_context, heads)
    log_total = residuals.log_total[:, :, None]
    # What softmax's derivative subtracts in each row: sum_k weight d_weight = context . d_context.
    inner = wide_einsum("bqhd,bqhd->bhq", residuals.context, d_context)[:, :, None]
    d_query, d_keys, d_values = jnp.zeros_like(q, log_total.dtype), [], []
    for rows in _blocks(q.shape[2]):
        q, d_query = jax.lax.optimization_barrier((q, d_query))
        columns = slice(rows.start, q.shape[2])
        k_block, q_rest, d_rest = k[:, :, rows], q[:, :, columns], d_c[:, :, columns]
        scores = scale * wide_einsum("bhkd,bhqd->bhkq", k_block, q_rest)
        scores = _hide_unseen(scores, segment_ids, rows=rows, columns=columns, sees=operator.le)
        weights = jnp.exp(scores - log_total[..., columns])
        d_weights = wide_einsum("bhkd,bhqd->bhkq", v[:, :, rows], d_rest)
        d_scores = (scale * weights * (d_weights - inner[..., columns])).astype(q.dtype)
        d_values.append(wide_einsum("bhkq,bhqd->bhkd", weights.astype(d_rest.dtype), d_rest))
        d_keys.append(wide_einsum("bhkq,bhqd->bhkd", d_scores, q_rest))
        d_query = d_query.at[:, :, columns].add(wide_einsum("bhkq,bhkd->bhqd", d_scores, k_block))
    gradients = AttentionInputs(
        query=d_query.swapaxes(1, 2).astype(query.dtype),
        key=_sum_readers(d_keys, key),
        value=_sum_readers(d_values, value),
        segment_ids=None,
    )
    return (gradients,)


def _sum_readers(blocks: list[Float[Array, "batch heads block head_dim"]], like: KeyValueHeads) -> KeyValueHeads:
    """The gradient of _heads_first: blocks joined, and summed over the query heads that read each key head."""
    joined = jnp.concatenate(blocks, axis=2).swapaxes(1, 2)
    batch, seq, kv_heads, head_dim = like.shape
    if joined.shape != like.shape:
        joined = joined.reshape(batch, seq, kv_heads, -1, head_dim).sum(3)
    return joined.astype(like.dtype)


blockwise_attention.defvjp(_forward, _backward)
