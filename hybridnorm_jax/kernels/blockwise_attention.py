"""Causal attention in plain JAX, block by block, on any platform; and statistics of its weights.

The forward pass takes the queries in blocks, each against the keys up to the block's end. The backward pass recomputes
the weights from the logarithm of their denominator (FlashAttention, 2205.14135). It takes the keys in blocks, each
against the queries from the block's start on. So only the queries' gradient is summed over blocks. Its product is also
the only one that contracts the first dimension of a block of scores, at which XLA's CPU backend has half its speed.
"""

import dataclasses
import math
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
from hybridnorm_jax.kernels.score_rules import PLAIN, ScoreRules

BlockScores = Float[Array, "batch heads rows columns"]


class AttentionStatistics(NamedTuple):
    """Statistics of attention's weights over a batch.

    Attributes:
      entropy: of the weights, in nats, mean over batch, heads and queries.
      largest_logit: of all.
    """

    entropy: Float[Array, ""]
    largest_logit: Float[Array, ""]


def attention_statistics(
    query: Heads, key: KeyValueHeads, segment_ids: SegmentIds = None, rules: ScoreRules = PLAIN
) -> AttentionStatistics:
    """Statistics of the weights that softmax_attention computes, in float32 at least; they have no gradient.

    The logits are z as score_rules.py says, the weights p = softmax(z) over the keys that a query sees, the entropy of
    a query -sum_k p log p. Where all weights of query i (from 0) are equal, its entropy is log(i + 1), if there are no
    segments and no windows. A sink is one more key here.
    """
    query, key, rules = jax.lax.stop_gradient((query, key, rules))
    rules = rules.within(query.shape[1])
    q, k = _heads_first(query, query.shape[2]), _heads_first(key, query.shape[2])
    entropies, largest = [], []
    for rows in _blocks(q.shape[2]):
        block = _Block(rules, segment_ids, queries=rows, keys=_keys_of(rules, rows, q.shape[2]))
        scores = block.scores(wide_einsum("bhqd,bhkd->bhqk", q[:, :, rows], k[:, :, block.keys]), query.shape[-1])
        largest.append(scores.max())
        if rules.sinks is not None:
            sinks = jnp.broadcast_to(rules.sinks_in(scores.dtype, (-1, 1, 1)), (*scores.shape[:-1], 1))
            scores = jnp.concatenate([scores, sinks], axis=-1)
        log_weights = jax.nn.log_softmax(scores)
        seen = jnp.where(jnp.isneginf(scores), 0, log_weights)  # 0 log 0 is 0
        entropies.append(-(jnp.exp(log_weights) * seen).sum((0, 1, 3)))
    queries = q.shape[0] * q.shape[1] * q.shape[2]
    return AttentionStatistics(
        entropy=jnp.concatenate(entropies).sum() / queries,
        largest_logit=jnp.stack(largest).max(),
    )


@jax.custom_vjp
def blockwise_attention(inputs: AttentionInputs, rules: ScoreRules) -> Heads:
    """softmax_attention of whole sequences: on one device, or split by batch and heads alone."""
    context, _ = _forward(inputs, rules)
    return context


def _block_size(seq: int) -> int:
    return 64 if seq <= 256 else 128 * math.ceil(seq / 1024)


def _blocks(seq: int) -> list[slice]:
    """At most 8 blocks of positions: small ones waste less above the diagonal, many take long to compile."""
    size = _block_size(seq)
    return [slice(start, min(start + size, seq)) for start in range(0, seq, size)]


def _keys_of(rules: ScoreRules, queries: slice, seq: int) -> slice:
    """The keys that a block of queries sees, in whole blocks."""
    end = queries.stop if rules.causal else seq
    if rules.window is None:
        return slice(0, end)
    if not rules.causal:
        end = _rounded_up(queries.stop + rules.window - 1, seq)
    return slice(_rounded_down(queries.start - rules.window + 1, seq), end)


def _queries_of(rules: ScoreRules, keys: slice, seq: int) -> slice:
    """The queries that see a block of keys, in whole blocks."""
    start = keys.start if rules.causal else 0
    if rules.window is None:
        return slice(start, seq)
    if not rules.causal:
        start = _rounded_down(keys.start - rules.window + 1, seq)
    return slice(start, _rounded_up(keys.stop + rules.window - 1, seq))


def _rounded_down(place: int, seq: int) -> int:
    return max(place // _block_size(seq) * _block_size(seq), 0)


def _rounded_up(place: int, seq: int) -> int:
    return min(-(-place // _block_size(seq)) * _block_size(seq), seq)


def _heads_first(x: KeyValueHeads, heads: int) -> Float[Array, "batch heads seq head_dim"]:
    """Heads before positions, each repeated for the query heads that read it."""
    return jnp.repeat(x.swapaxes(1, 2), heads // x.shape[2], axis=1)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some queries and some keys of whole sequences.

    Attributes:
      rules: what is made of their products.
      segment_ids: of the whole sequences.
      queries, keys: which.
      keys_first: scores are (batch, heads, keys, queries); otherwise queries come before keys.
    """

    rules: ScoreRules
    segment_ids: SegmentIds
    queries: slice
    keys: slice
    keys_first: bool = False

    def scores(self, products: BlockScores, head_dim: int) -> BlockScores:
        """The scores of these products, -inf where a query does not see a key."""
        return self.masked(self.capped(products, head_dim))

    def capped(self, products: BlockScores, head_dim: int) -> BlockScores:
        """The products times their scale, and capped."""
        return self.rules.capped(self.rules.scale_of(head_dim) * products)

    def masked(self, capped: BlockScores) -> BlockScores:
        """What capped products are with ALiBi and the mask."""
        query, key = jnp.arange(self.queries.start, self.queries.stop), jnp.arange(self.keys.start, self.keys.stop)
        query, key = self._beside(query, key)
        alibi = self.rules.alibi
        if alibi is not None:
            key_position = None
            if alibi.key_positions is not None:
                _, key_position = self._beside(None, alibi.key_positions[:, None, self.keys])
            added = alibi.added((-1, 1, 1), query=query, key=key, key_position=key_position)
            capped = capped + added.astype(capped.dtype)
        visible = self.rules.visible(query, key)
        if self.segment_ids is not None:
            query_ids, key_ids = self.segment_ids[:, None, self.queries], self.segment_ids[:, None, self.keys]
            query_ids, key_ids = self._beside(query_ids, key_ids)
            same = query_ids == key_ids
            visible = same if visible is None else visible & same
        return capped if visible is None else jnp.where(visible, capped, -jnp.inf)

    def _beside(self, query: Array | None, key: Array) -> tuple[Array | None, Array]:
        """Numbers of queries and of keys, each with one more axis of length 1 for the other."""
        of_query, of_key = (-2, -1) if self.keys_first else (-1, -2)
        return None if query is None else jnp.expand_dims(query, of_query), jnp.expand_dims(key, of_key)


class _Residuals(NamedTuple):
    """What the backward pass needs: of the attention itself, and the rules."""

    attention: AttentionResiduals
    rules: ScoreRules


def _forward(inputs: AttentionInputs, rules: ScoreRules) -> tuple[Heads, _Residuals]:
    heads, head_dim = inputs.query.shape[2:]
    q, k, v = _heads_first(inputs.query, heads), _heads_first(inputs.key, heads), _heads_first(inputs.value, heads)
    residual_rules, seq = rules, q.shape[2]
    rules = rules.within(seq)
    contexts, log_totals = [], []
    for rows in _blocks(seq):
        if contexts:
            # One block after the other: XLA for TPU otherwise holds the scores of all of them at once.
            q, contexts[-1] = jax.lax.optimization_barrier((q, contexts[-1]))
        columns = _keys_of(rules, rows, seq)
        block = _Block(rules, inputs.segment_ids, queries=rows, keys=columns)
        scores = block.scores(wide_einsum("bhqd,bhkd->bhqk", q[:, :, rows], k[:, :, columns]), head_dim)
        highest = scores.max(-1, keepdims=True)
        sinks = None if rules.sinks is None else rules.sinks_in(q.dtype, (-1, 1, 1))
        if sinks is not None:
            highest = jnp.maximum(highest, sinks)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sinks - highest)
        contexts.append(wide_einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[:, :, columns]) / total)
        log_totals.append((highest + jnp.log(total))[..., 0])
    context = jnp.concatenate(contexts, axis=2).swapaxes(1, 2).astype(inputs.query.dtype)
    context, log_total = checkpoint_name((context, jnp.concatenate(log_totals, axis=2)), SAVED)
    return context, _Residuals(AttentionResiduals(inputs, context, log_total), residual_rules)


def _backward(residuals: _Residuals, d_context: Heads) -> tuple[AttentionInputs, ScoreRules]:
    inputs, context, log_total = residuals.attention
    query, key, value, segment_ids = inputs
    _, seq, heads, head_dim = query.shape
    rules = residuals.rules.within(seq)
    scale = rules.scale_of(head_dim)
    q, k, v = _heads_first(query, heads), _heads_first(key, heads), _heads_first(value, heads)
    d_c = _heads_first(d_context, heads)
    log_total = log_total[:, :, None]
    # What softmax's derivative subtracts in each row: sum_k weight d_weight = context . d_context.
    inner = wide_einsum("bqhd,bqhd->bhq", context, d_context)[:, :, None]
    d_query, d_keys, d_values = jnp.zeros_like(q, log_total.dtype), [], []
    for rows in _blocks(seq):
        q, d_query = jax.lax.optimization_barrier((q, d_query))
        columns = _queries_of(rules, rows, seq)
        k_block, q_rest, d_rest = k[:, :, rows], q[:, :, columns], d_c[:, :, columns]
        block = _Block(rules, segment_ids, queries=columns, keys=rows, keys_first=True)
        capped = block.capped(wide_einsum("bhkd,bhqd->bhkq", k_block, q_rest), head_dim)
        weights = jnp.exp(block.masked(capped) - log_total[..., columns])
        d_weights = wide_einsum("bhkd,bhqd->bhkq", v[:, :, rows], d_rest)
        d_scores = rules.through_cap(scale * weights * (d_weights - inner[..., columns]), capped).astype(q.dtype)
        d_values.append(wide_einsum("bhkq,bhqd->bhkd", weights.astype(d_rest.dtype), d_rest))
        d_keys.append(wide_einsum("bhkq,bhqd->bhkd", d_scores, q_rest))
        d_query = d_query.at[:, :, columns].add(wide_einsum("bhkq,bhkd->bhqd", d_scores, k_block))
    gradients = AttentionInputs(
        query=d_query.swapaxes(1, 2).astype(query.dtype),
        key=_sum_readers(d_keys, key),
        value=_sum_readers(d_values, value),
        segment_ids=None,
    )
    d_sinks = None
    if rules.sinks is not None:
        weights = jnp.exp(rules.sinks_in(q.dtype, (-1, 1, 1)) - log_total)
        d_sinks = -(weights * inner).sum((0, 2, 3)).astype(rules.sinks.dtype)
    return gradients, residuals.rules.gradient(d_sinks)


def _sum_readers(blocks: list[Float[Array, "batch heads block head_dim"]], like: KeyValueHeads) -> KeyValueHeads:
    """The gradient of _heads_first: blocks joined, and summed over the query heads that read each key head."""
    joined = jnp.concatenate(blocks, axis=2).swapaxes(1, 2)
    batch, seq, kv_heads, head_dim = like.shape
    if joined.shape != like.shape:
        joined = joined.reshape(batch, seq, kv_heads, -1, head_dim).sum(3)
    return joined.astype(like.dtype)


blockwise_attention.defvjp(_forward, _backward)
