"""The forward kernel of tpu_attention.py: norms and rotation of the heads, scores, softmax and the sum of values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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


def forward_kernel(
    inputs: KernelInputs,
    context: Any,
    log_total: Any,
    keys: Any,
    values: Any,
    columns_of_ids: Any,
    *,
    block: int,
    scale: float,
) -> None:
    """One query head of one sequence; the heads that read the same keys follow each other.

    Args:
      inputs: references (head_dim, seq) to a query head and its key head.
      context: takes the result, (head_dim, seq).
      log_total: takes the logarithm of the softmax's denominator, (1, seq).
      keys, values: keep the prepared keys (seq, head_dim) and values (head_dim, seq) from head to head.
      columns_of_ids: keeps the keys' segment ids, (seq, LANES); None without segment ids.
      block: how many positions are taken at a time.
      scale: factor of the products of queries and keys.
    """
    seq = inputs.query.shape[1]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        if inputs.segment_ids is not None:
            keep_columns_of_ids(inputs.segment_ids, columns_of_ids, block)

        def prepare(index: Any) -> None:
            here = positions(index, block)
            key = rotated(normalized(inputs.key[:, here], inputs.key_norm), inputs.cos, inputs.sin, here)
            keys[here, :] = key.T.astype(keys.dtype)
            values[:, here] = normalized(inputs.value[:, here], inputs.value_norm).astype(values.dtype)

        each_block(seq, block, prepare)

    def attend(row: Any) -> None:
        here = positions(row, block)
        query = rotated(normalized(inputs.query[:, here], inputs.query_norm), inputs.cos, inputs.sin, here)
        query = (query * scale).astype(keys.dtype)
        query_ids = None if inputs.segment_ids is None else inputs.segment_ids[:, here]

        def seen(column: Any, *, diagonal: bool) -> jax.Array:
            there = positions(column, block)
            key_ids = None if columns_of_ids is None else columns_of_ids[there, :][:, :1]
            return scores(keys[there, :], query, key_ids=key_ids, query_ids=query_ids, diagonal=diagonal)

        # Each query sees itself: with the diagonal first the largest score is finite from the start.
        logits = seen(row, diagonal=True)
        largest = logits.max(axis=0, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(axis=0, keepdims=True)
        summed = dot(values[:, here], weights.astype(values.dtype))

        def add(column: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            largest, total, summed = carry
            logits = seen(column, diagonal=False)
            larger = jnp.maximum(largest, logits.max(axis=0, keepdims=True))
            weights, shrunk = jnp.exp(logits - larger), jnp.exp(largest - larger)
            total = total * shrunk + weights.sum(axis=0, keepdims=True)
            there = positions(column, block)
            summed = summed * shrunk + dot(values[:, there], weights.astype(values.dtype))
            return larger, total, summed

        largest, total, summed = jax.lax.fori_loop(0, row, add, (largest, total, summed))
        context[:, here] = (summed / total).astype(context.dtype)
        log_total[:, here] = largest + jnp.log(total)

    each_block(seq, block, attend)
