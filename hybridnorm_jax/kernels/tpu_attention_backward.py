"""The backward kernel of tpu_attention.py: gradients of projected q, k and v, and of the norms' parameters.

The weights are recomputed from the logarithm of their denominator (FlashAttention, 2205.14135, algorithm 4). One pass
over the blocks gives all three gradients, which stay in the core's memory until they are whole: five products of a
block of queries with a block of keys, where two passes need seven.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybridnorm_jax.kernels.head_preparation import HeadNorm
from hybridnorm_jax.kernels.tpu_attention_blocks import (
    KernelInputs,
    dot,
    each_block,
    keep_columns_of_ids,
    normalized,
    positions,
    rotated,
    scores,
)


class Results(NamedTuple):
    """What a backward kernel knows of the forward pass: references to one query head's share.

    Attributes:
      context, d_context: the result and its gradient, (head_dim, seq).
      log_total: logarithm of the softmax's denominator, (1, seq).
    """

    context: Any
    log_total: Any
    d_context: Any


class Gradients(NamedTuple):
    """References that take the gradients, of the shapes of what they belong to; None for a norm that is absent."""

    query: Any
    key: Any
    value: Any
    query_norm: HeadNorm | None
    key_norm: HeadNorm | None
    value_norm: HeadNorm | None


class Kept(NamedTuple):
    """Scratch memory of one key head.

    Attributes:
      queries: prepared and scaled, (head_dim, seq).
      keys: prepared, (head_dim, seq).
      key_rows, value_rows: prepared keys and values, (seq, head_dim).
      d_query, d_key, d_value: gradients of prepared heads, (head_dim, seq) in float32.
      mean_gradient: sum over channels of context times its gradient, (1, seq).
      columns_of_ids: see keep_columns_of_ids.
    """

    queries: Any
    keys: Any
    key_rows: Any
    value_rows: Any
    d_query: Any
    d_key: Any
    d_value: Any
    mean_gradient: Any
    columns_of_ids: Any | None


def backward_kernel(
    inputs: KernelInputs, results: Results, gradients: Gradients, kept: Kept, *, block: int, scale: float
) -> None:
    """One query head of one sequence; the heads that read the same keys follow each other, and add to their gradient.

    Args:
      block: how many positions are taken at a time.
      scale: factor of the products of queries and keys.
    """
    seq = inputs.query.shape[1]
    group, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(group == 0)
    def _() -> None:
        if inputs.segment_ids is not None:
            keep_columns_of_ids(inputs.segment_ids, kept.columns_of_ids, block)
        for norm in (gradients.query_norm, gradients.key_norm, gradients.value_norm):
            for parameter in jax.tree.leaves(norm):
                parameter[...] = jnp.zeros_like(parameter)
        each_block(seq, block, lambda index: _prepare_keys(inputs, kept, positions(index, block)))

    each_block(seq, block, lambda index: _prepare_queries(inputs, results, kept, positions(index, block), scale))
    each_block(seq, block, lambda column: _differentiate(inputs, results, kept, column, block=block))
    each_block(seq, block, lambda index: _write_d_query(inputs, gradients, kept, positions(index, block), scale))

    @pl.when(group == last)
    def _() -> None:
        each_block(seq, block, lambda index: _write_d_key_and_value(inputs, gradients, kept, positions(index, block)))


def _prepare_keys(inputs: KernelInputs, kept: Kept, here: Any) -> None:
    key = rotated(normalized(inputs.key[:, here], inputs.key_norm), inputs.cos, inputs.sin, here)
    kept.keys[:, here] = key.astype(kept.keys.dtype)
    kept.key_rows[here, :] = key.T.astype(kept.key_rows.dtype)
    value = normalized(inputs.value[:, here], inputs.value_norm)
    kept.value_rows[here, :] = value.T.astype(kept.value_rows.dtype)
    kept.d_key[:, here] = jnp.zeros_like(key)
    kept.d_value[:, here] = jnp.zeros_like(value)


def _prepare_queries(inputs: KernelInputs, results: Results, kept: Kept, here: Any, scale: float) -> None:
    query = rotated(normalized(inputs.query[:, here], inputs.query_norm), inputs.cos, inputs.sin, here)
    kept.queries[:, here] = (query * scale).astype(kept.queries.dtype)
    kept.d_query[:, here] = jnp.zeros_like(query)
    context, d_context = results.context[:, here], results.d_context[:, here]
    product = context.astype(jnp.float32) * d_context.astype(jnp.float32)
    kept.mean_gradient[:, here] = product.sum(axis=0, keepdims=True)


def _differentiate(inputs: KernelInputs, results: Results, kept: Kept, column: Any, *, block: int) -> None:
    """Add what one block of keys contributes, with all queries that see it."""
    seq = inputs.query.shape[1]
    there = positions(column, block)
    keys, key_rows, value_rows = kept.keys[:, there], kept.key_rows[there, :], kept.value_rows[there, :]
    key_ids = None if kept.columns_of_ids is None else kept.columns_of_ids[there, :][:, :1]

    def add(row: Any, *, diagonal: bool) -> tuple[jax.Array, jax.Array]:
        """To the queries' gradient; returns the keys' and the values'."""
        here = positions(row, block)
        query_ids = None if inputs.segment_ids is None else inputs.segment_ids[:, here]
        queries, d_context = kept.queries[:, here], results.d_context[:, here]
        logits = scores(key_rows, queries, key_ids=key_ids, query_ids=query_ids, diagonal=diagonal)
        weights = jnp.exp(logits - results.log_total[:, here])
        d_weights = dot(value_rows, d_context)
        d_logits = (weights * (d_weights - kept.mean_gradient[:, here])).astype(queries.dtype)
        kept.d_query[:, here] += dot(keys, d_logits)
        d_key = dot(queries, d_logits, transposed=True)
        return d_key, dot(d_context, weights.astype(d_context.dtype), transposed=True)

    def further(row: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_key, d_value = add(row, diagonal=False)
        return carry[0] + d_key, carry[1] + d_value

    d_key, d_value = jax.lax.fori_loop(column + 1, seq // block, further, add(column, diagonal=True))
    kept.d_key[:, there] += d_key
    kept.d_value[:, there] += d_value


def _write_d_query(inputs: KernelInputs, gradients: Gradients, kept: Kept, here: Any, scale: float) -> None:
    d_query = kept.d_query[:, here] * scale
    d_query = rotated(d_query, inputs.cos, inputs.sin, here, back=True)
    gradients.query[:, here] = _through_norm(inputs.query[:, here], d_query, inputs.query_norm, gradients.query_norm)


def _write_d_key_and_value(inputs: KernelInputs, gradients: Gradients, kept: Kept, here: Any) -> None:
    d_key = rotated(kept.d_key[:, here], inputs.cos, inputs.sin, here, back=True)
    gradients.key[:, here] = _through_norm(inputs.key[:, here], d_key, inputs.key_norm, gradients.key_norm)
    d_value = kept.d_value[:, here]
    gradients.value[:, here] = _through_norm(inputs.value[:, here], d_value, inputs.value_norm, gradients.value_norm)


def _through_norm(x: jax.Array, gradient: jax.Array, norm: HeadNorm | None, d_norm: HeadNorm | None) -> jax.Array:
    """The gradient of x from that of its norm, in the dtype of x; adds to the gradients of the norm's parameters."""
    if norm is None or d_norm is None:
        return gradient.astype(x.dtype)
    norm = jax.tree.map(lambda parameter: parameter[...], norm)
    _, pull = jax.vjp(normalized, x.astype(jnp.float32), norm)
    d_x, d_parameters = pull(gradient)
    for total, part in zip(jax.tree.leaves(d_norm), jax.tree.leaves(d_parameters), strict=True):
        total[...] += part
    return d_x.astype(x.dtype)
