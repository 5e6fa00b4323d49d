"""Causal attention over a sequence that is split among n devices, exact, with the same work for each.

Device i holds the i-th stretch of every sequence. Were it to compute that stretch, the last device would do twice the
mean. So the 2n half stretches of the queries are exchanged first: device i computes halves i and 2n - 1 - i, which see
2n + 1 halves of keys together, whatever i. Keys and values are gathered, in the forward pass and again in the backward
pass; what is kept between the two is a device's own share. (Ring attention, 2310.01889, passes keys around instead
and never holds all of them: seq * kv_heads * head_dim * 4 bytes of bfloat16 keys and values here, 0.5 GB for
131,072 tokens and 8 heads of 128.)
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hybridnorm_jax.mesh.logical_axes import parts, split_axes

Axes = tuple[str, ...]
SegmentIds = Int[Array, "batch seq"] | None

# Keys that a device looks at at a time; scores of one such block are all it holds of them.
BLOCK = 512


def zigzag(seq: int, shards: int) -> np.ndarray:
    """The position of every row when all devices' rows, after to_zigzag, stand one behind the other."""
    halves = np.arange(seq).reshape(2 * shards, -1)
    return np.concatenate([halves[half] for i in range(shards) for half in (i, 2 * shards - 1 - i)])


def _moves(shards: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(source, target) of each device's first half and of its second half: the even and the odd ones of 2n."""
    target = [half if half < shards else 2 * shards - 1 - half for half in range(2 * shards)]
    return [(i, target[2 * i]) for i in range(shards)], [(i, target[2 * i + 1]) for i in range(shards)]


def to_zigzag(x: Float[Array, "batch local ..."], axes: Axes) -> Float[Array, "batch local ..."]:
    """Inside jax.shard_map: from this device's stretch to halves i and 2n - 1 - i."""
    evens, odds = _moves(jax.lax.axis_size(axes))
    first, second = jnp.split(x, 2, axis=1)
    even, odd = jax.lax.ppermute(first, axes, evens), jax.lax.ppermute(second, axes, odds)
    # Of i and 2n - 1 - i one is even, one odd.
    own_is_even = jax.lax.axis_index(axes) % 2 == 0
    return jnp.concatenate([jnp.where(own_is_even, even, odd), jnp.where(own_is_even, odd, even)], axis=1)


def from_zigzag(x: Float[Array, "batch local ..."], axes: Axes) -> Float[Array, "batch local ..."]:
    """The inverse of to_zigzag."""
    evens, odds = ([(there, here) for here, there in moves] for moves in _moves(jax.lax.axis_size(axes)))
    low, high = jnp.split(x, 2, axis=1)
    own_is_even = jax.lax.axis_index(axes) % 2 == 0
    even, odd = jnp.where(own_is_even, low, high), jnp.where(own_is_even, high, low)
    return jnp.concatenate([jax.lax.ppermute(even, axes, evens), jax.lax.ppermute(odd, axes, odds)], axis=1)


def sequence_axes(seq: int) -> Axes:
    """The axes of the mesh in force that split a sequence of this length; none where their halves do not divide it."""
    axes = split_axes("seq", seq)
    return axes if seq % (2 * parts(axes)) == 0 else ()


def on_mesh(
    local: Callable,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: SegmentIds,
    *,
    sequence: Axes = (),
    before: tuple[tuple[Any, Any], ...] = (),
) -> Float[Array, "batch seq heads head_dim"]:
    """jax.shard_map of `local` over sequences, positions (by the axes `sequence`) and heads, as the rules split them.

    Args:
      before: (argument, its specs) pairs that `local` gets in front.
    """
    rows, columns = split_axes("batch", query.shape[0]), split_axes("heads", query.shape[2])
    # As many key heads as the axes divide; query head h still reads the same values.
    copies = parts(columns) // math.gcd(parts(columns), key.shape[2])
    key, value = jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2)
    spec, ids = PartitionSpec(rows, sequence, columns), PartitionSpec(rows, sequence)
    arguments, specs = zip(*before, strict=True) if before else ((), ())
    # check_vma: kernels, and loops with a gradient of their own, do not say over which axes their results vary.
    mapped = jax.shard_map(local, in_specs=(*specs, spec, spec, spec, ids), out_specs=spec, check_vma=False)
    return mapped(*arguments, query, key, value, segment_ids)


def gather(x: Float[Array, "batch local ..."], axes: Axes) -> Float[Array, "batch seq ..."]:
    """Inside jax.shard_map: the whole sequence."""
    return jax.lax.all_gather(x, axes, axis=1, tiled=True)


def zigzag_attention(
    query: Float[Array, "batch local heads head_dim"],
    key: Float[Array, "batch local kv_heads head_dim"],
    value: Float[Array, "batch local kv_heads head_dim"],
    segment_ids: SegmentIds,
    *,
    axes: Axes,
    saved_as: str,
) -> Float[Array, "batch local heads head_dim"]:
    """Inside jax.shard_map: this device's share of kernels.attention.causal_attention.

    Args:
      axes: the mesh axes that split the sequence.
      saved_as: checkpoint name of what the backward pass needs besides query, key and value.
    """
    context = _attend(to_zigzag(query, axes), key, value, segment_ids, axes, saved_as)
    return from_zigzag(context, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, segment_ids, axes, saved_as):
    return _forward(query, key, value, segment_ids, axes, saved_as)[0]


class _Share:
    """One device's two halves of queries and the blocks of keys that they see, in the order of a loop.

    Arrays of queries are (2, batch, kv_heads, readers, half, ...): the two halves, then the heads by what they read.
    """

    def __init__(self, query: Array, key: Array, segment_ids: SegmentIds, axes: Axes):
        self.batch, local, self.heads, self.head_dim = query.shape
        self.shards, self.kv_heads, self.half = jax.lax.axis_size(axes), key.shape[2], local // 2
        self.block = max(size for size in range(1, min(BLOCK, self.half) + 1) if self.half % size == 0)
        device = jax.lax.axis_index(axes)
        self.starts = self.half * jnp.stack([device, 2 * self.shards - 1 - device])
        self.ids = None if segment_ids is None else gather(segment_ids, axes)
        self.dtype = jnp.promote_types(query.dtype, jnp.float32)
        self.einsum = functools.partial(jnp.einsum, preferred_element_type=self.dtype)
        self.scale = self.head_dim**-0.5

    def split(self, x: Float[Array, "batch local heads ..."]) -> Array:
        x = x.reshape(self.batch, 2, self.half, self.kv_heads, self.heads // self.kv_heads, *x.shape[3:])
        return jnp.moveaxis(x, (1, 3, 4), (0, 2, 3))

    def join(self, x: Array) -> Float[Array, "batch local heads ..."]:
        x = jnp.moveaxis(x, (0, 2, 3), (1, 3, 4))
        return x.reshape(self.batch, 2 * self.half, self.heads, *x.shape[5:])

    def loop(self, visit, carry):
        """carry = visit(half, first key, carry) for every block of keys that half 0, and then half 1, sees."""
        seen_by_low = self.starts[0] // self.block + self.half // self.block

        def body(step, carry):
            half = (step >= seen_by_low).astype(jnp.int32)
            return visit(half, (step - half * seen_by_low) * self.block, carry)

        return jax.lax.fori_loop(0, (2 * self.shards + 1) * self.half // self.block, body, carry)

    def keys(self, x: Float[Array, "batch seq kv_heads head_dim"], first: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, self.block, axis=1)

    def scores(
        self, q: Array, k: Array, half: Array, first: Array
    ) -> Float[Array, "batch kv_heads readers half block"]:
        """Scores of one half and one block, very small where a query does not see a key."""
        scores = self.scale * self.einsum("bkrqd,bskd->bkrqs", q, k)
        rows, columns = self.starts[half] + jnp.arange(self.half), first + jnp.arange(self.block)
        visible = rows[:, None] >= columns
        if self.ids is not None:
            row_ids = jax.lax.dynamic_slice_in_dim(self.ids, self.starts[half], self.half, axis=1)
            column_ids = jax.lax.dynamic_slice_in_dim(self.ids, first, self.block, axis=1)
            visible = (visible & (row_ids[:, :, None] == column_ids[:, None]))[:, None, None]
        # Finite: where a whole row of a block is invisible, its weights are wiped out by the next visible score.
        return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)


def _forward(query, key, value, segment_ids, axes, saved_as):
    share = _Share(query, key, segment_ids, axes)
    q, k, v = share.split(query), gather(key, axes), gather(value, axes)

    def visit(half, first, carry):
        highest, total, context = (array[half] for array in carry)
        scores = share.scores(q[half], share.keys(k, first), half, first)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights, shrink = jnp.exp(scores - new_highest[..., None]), jnp.exp(highest - new_highest)
        added = share.einsum("bkrqs,bskd->bkrqd", weights.astype(v.dtype), share.keys(v, first))
        new = new_highest, shrink * total + weights.sum(-1), shrink[..., None] * context + added
        return tuple(array.at[half].set(part) for array, part in zip(carry, new, strict=True))

    rows = q.shape[:-1]
    lowest = jnp.full(rows, jnp.finfo(share.dtype).min, share.dtype)
    carry = lowest, jnp.zeros(rows, share.dtype), jnp.zeros(q.shape, share.dtype)
    highest, total, context = share.loop(visit, carry)
    context = share.join(context / total[..., None]).astype(query.dtype)
    context, log_total = checkpoint_name((context, highest + jnp.log(total)), saved_as)
    return context, (query, key, value, segment_ids, context, log_total)


def _backward(axes, saved_as, residuals, d_context):
    query, key, value, segment_ids, context, log_total = residuals
    share = _Share(query, key, segment_ids, axes)
    q, k, v, d_c = share.split(query), gather(key, axes), gather(value, axes), share.split(d_context)
    # What softmax's derivative subtracts in each row: sum_k weight d_weight = context . d_context.
    inner = (share.split(context).astype(share.dtype) * d_c.astype(share.dtype)).sum(-1)

    def visit(half, first, carry):
        d_query, d_key, d_value = carry
        q_half, d_half, k_block, v_block = q[half], d_c[half], share.keys(k, first), share.keys(v, first)
        weights = jnp.exp(share.scores(q_half, k_block, half, first) - log_total[half][..., None])
        d_weights = share.einsum("bkrqd,bskd->bkrqs", d_half, v_block)
        d_scores = (share.scale * weights * (d_weights - inner[half][..., None])).astype(q.dtype)
        d_query = d_query.at[half].add(share.einsum("bkrqs,bskd->bkrqd", d_scores, k_block))
        pieces = (
            share.einsum("bkrqs,bkrqd->bskd", d_scores, q_half),
            share.einsum("bkrqs,bkrqd->bskd", weights.astype(d_half.dtype), d_half),
        )
        d_key, d_value = (
            jax.lax.dynamic_update_slice_in_dim(total, share.keys(total, first) + piece, first, axis=1)
            for total, piece in zip((d_key, d_value), pieces, strict=True)
        )
        return d_query, d_key, d_value

    zeros = tuple(jnp.zeros(array.shape, share.dtype) for array in (q, k, v))
    d_query, *d_keys_values = share.loop(visit, zeros)
    d_key, d_value = (
        jax.lax.psum_scatter(total, axes, scatter_dimension=1, tiled=True).astype(key.dtype) for total in d_keys_values
    )
    return share.join(d_query).astype(query.dtype), d_key, d_value, None


_attend.defvjp(_forward, _backward)
