"""Causal attention over a sequence that is split among n devices, exact, with the same work for each (zigzag.py).

Keys and values are gathered, in the forward pass and again in the backward pass; what is kept between the two is a
device's own share. (Ring attention, 2310.01889, passes keys around instead and never holds all of them. In bfloat16
they take seq * kv_heads * head_dim * 4 bytes with their values: 0.5 GB for 131,072 tokens and 8 heads of 128.)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.attention_arrays import AttentionInputs, AttentionResiduals
from hybridnorm_jax.kernels.precision import wide_dtype, wide_einsum
from hybridnorm_jax.kernels.score_rules import ScoreRules
from hybridnorm_jax.kernels.zigzag import from_zigzag, gather_sequence, to_zigzag
from hybridnorm_jax.mesh.split_axes import Axes

Carry = TypeVar("Carry")
LocalHeads = Float[Array, "batch local heads head_dim"]
# The queries of both halves of a device, heads by the key head that they read.
Halves = Float[Array, "halves batch kv_heads readers half head_dim"]
Keys = Float[Array, "batch seq kv_heads head_dim"]
KeyBlock = Float[Array, "batch block kv_heads head_dim"]
Scores = Float[Array, "batch kv_heads readers half block"]

# Keys that a device looks at at a time; scores of one such block are all it holds of them.
BLOCK = 512


def zigzag_attention(rules: ScoreRules, inputs: AttentionInputs, *, axes: Axes, saved_as: str) -> LocalHeads:
    """Inside jax.shard_map: this device's share of kernels.attention_backends.softmax_attention.

    Args:
      rules: what is made of the scores, for this device's heads and its stretch of every sequence.
      inputs: this device's stretch of every sequence.
      axes: the mesh axes that split the sequence.
      saved_as: checkpoint name of what the backward pass needs besides query, key and value.
    """
    exchanged = inputs._replace(query=to_zigzag(inputs.query, axes))
    return from_zigzag(_attend(exchanged, rules, axes, saved_as), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(inputs: AttentionInputs, rules: ScoreRules, axes: Axes, saved_as: str) -> LocalHeads:
    """The attention of queries after to_zigzag to keys and values before it."""
    context, _ = _forward(inputs, rules, axes, saved_as)
    return context


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share:
    """One device's two halves of queries, 0 (low) and 1 (high), and the blocks of keys that they see.

    Attributes:
      batch: sequences.
      heads: query heads.
      kv_heads: key heads; the same number of query heads reads each.
      head_dim: channels of a head.
      shards: devices that share a sequence.
      half: positions in a half.
      block: keys in a block, which divides a half.
      starts: the position of each half's first query.
      ids: segment ids of the whole sequence, or None.
      rules: what is made of the scores.
      key_positions: of the whole sequence, where ALiBi asks for them.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    shards: int
    half: int
    block: int
    starts: Int[Array, "2"]
    ids: Int[Array, "batch seq"] | None
    rules: ScoreRules
    key_positions: Int[Array, "batch seq"] | None

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return self.rules.scale_of(self.head_dim)

    @property
    def of_heads(self) -> tuple[int, ...]:
        """The shape of one number of each head, beside scores."""
        return (self.kv_heads, self.heads // self.kv_heads, 1, 1)

    def sinks(self, dtype: Any) -> Array | None:
        """Of each head beside scores without their keys, or None."""
        return None if self.rules.sinks is None else self.rules.sinks_in(dtype, self.of_heads[:-1])

    def split(self, x: LocalHeads) -> Halves:
        """A device's queries, or what belongs to them, by half and by key head."""
        x = x.reshape(self.batch, 2, self.half, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        return jnp.einsum("bhskrd->hbkrsd", x)  # h: halves, s: positions of a half, k: key heads, r: readers

    def join(self, x: Halves) -> LocalHeads:
        """The inverse of `split`."""
        x = jnp.einsum("hbkrsd->bhskrd", x)
        return x.reshape(self.batch, 2 * self.half, self.heads, self.head_dim)

    def for_each_block(self, visit: Callable[[Array, Array, Carry], Carry], carry: Carry) -> Carry:
        """carry = visit(half, first key, carry) for every block of keys that half 0, and then half 1, sees.

        A block may lie behind the last key; then it is one that no query of the half sees.
        """
        blocks_in_half = self.half // self.block
        first = jnp.zeros(2, jnp.int32)
        if self.rules.causal:
            # The low half of device i sees i + 1 halves of keys, the high half 2n - i.
            by_low, steps = self.starts[0] // self.block + blocks_in_half, (2 * self.shards + 1) * blocks_in_half
        else:
            by_low, steps = jnp.asarray(2 * self.shards * blocks_in_half), 4 * self.shards * blocks_in_half
        if self.rules.causal and self.rules.window is not None:
            nearest = -(-(self.half + self.rules.window - 1) // self.block) + 1
            if 2 * nearest < steps:
                by_low, steps = jnp.asarray(nearest), 2 * nearest
                first = jnp.maximum(self.starts - self.rules.window + 1, 0) // self.block

        def body(step: Array, carry: Carry) -> Carry:
            is_high = step >= by_low
            half = is_high.astype(jnp.int32)
            number = first[half] + jnp.where(is_high, step - by_low, step)
            return visit(half, number * self.block, carry)

        return jax.lax.fori_loop(0, steps, body, carry)

    def keys(self, x: Keys, first: Array) -> KeyBlock:
        """The block of keys, or of values, from `first` on."""
        return jax.lax.dynamic_slice_in_dim(x, first, self.block, axis=1)

    def add_to_keys(self, x: Keys, added: KeyBlock, first: Array) -> Keys:
        """x with a block added to the keys from `first` on."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.keys(x, first) + added, first, axis=1)

    def capped(self, q: Array, k: KeyBlock) -> Scores:
        """Scaled and capped products of one half and one block."""
        return self.rules.capped(self.scale * wide_einsum("bkrqd,bskd->bkrqs", q, k))

    def masked(self, capped: Scores, half: Array, first: Array) -> Scores:
        """Scores of one half and one block, very small where a query does not see a key."""
        rows, columns = self.starts[half] + jnp.arange(self.half), first + jnp.arange(self.block)
        alibi = self.rules.alibi
        if alibi is not None:
            position = None if self.key_positions is None else self._of_block(self.key_positions, first)
            position = None if position is None else position[:, None, None, None]
            added = alibi.added(self.of_heads, query=rows[:, None], key=columns, key_position=position)
            capped = capped + added.astype(capped.dtype)
        visible = self.rules.visible(rows[:, None], columns)
        if self.ids is not None:
            row_ids = jax.lax.dynamic_slice_in_dim(self.ids, self.starts[half], self.half, axis=1)
            column_ids = self._of_block(self.ids, first)
            same = (row_ids[:, :, None] == column_ids[:, None])[:, None, None]
            visible = same if visible is None else visible & same
        # Finite: where a whole row of a block is invisible, its weights are wiped out by the next visible score.
        return capped if visible is None else jnp.where(visible, capped, jnp.finfo(capped.dtype).min)

    def _of_block(self, x: Int[Array, "batch seq"], first: Array) -> Int[Array, "batch block"]:
        return jax.lax.dynamic_slice_in_dim(x, first, self.block, axis=1)


def _share_of(inputs: AttentionInputs, rules: ScoreRules, axes: Axes) -> _Share:
    """The share of the device that this runs on, whose sequences the mesh axes `axes` split."""
    batch, local, heads, head_dim = inputs.query.shape
    shards, device = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    half = local // 2
    positions = None if rules.alibi is None else rules.alibi.key_positions
    return _Share(
        batch=batch,
        heads=heads,
        kv_heads=inputs.key.shape[2],
        head_dim=head_dim,
        shards=shards,
        half=half,
        block=_block_length(half),
        starts=half * jnp.stack([device, 2 * shards - 1 - device]),
        ids=None if inputs.segment_ids is None else gather_sequence(inputs.segment_ids, axes),
        rules=rules.within(shards * local),
        key_positions=None if positions is None else gather_sequence(positions, axes),
    )


def _block_length(half: int) -> int:
    """A divisor of `half`: the largest up to BLOCK or, where that is tiny (half a prime number, say), the next one.

    Blocks of a few keys would make thousands of steps of a loop out of one product.
    """
    divisors = [size for size in range(1, half + 1) if half % size == 0]
    up_to = max(size for size in divisors if size <= BLOCK)
    return up_to if 8 * up_to >= min(BLOCK, half) else min(size for size in divisors if size > BLOCK)


class _RunningSoftmax(NamedTuple):
    """The softmax of the keys seen so far, for both halves of queries.

    Attributes:
      highest: score of each query.
      total: sum of exp(score - highest).
      context: sum of exp(score - highest) value.
    """

    highest: Float[Array, "halves batch kv_heads readers half"]
    total: Float[Array, "halves batch kv_heads readers half"]
    context: Halves


class _Residuals(NamedTuple):
    """What the backward pass needs: of the attention itself, and the rules."""

    attention: AttentionResiduals
    rules: ScoreRules


def _forward(inputs: AttentionInputs, rules: ScoreRules, axes: Axes, saved_as: str) -> tuple[LocalHeads, _Residuals]:
    share = _share_of(inputs, rules, axes)
    q = share.split(inputs.query)
    k, v = gather_sequence(inputs.key, axes), gather_sequence(inputs.value, axes)

    def visit(half: Array, first: Array, running: _RunningSoftmax) -> _RunningSoftmax:
        before = jax.tree.map(lambda array: array[half], running)
        scores = share.masked(share.capped(q[half], share.keys(k, first)), half, first)
        highest = jnp.maximum(before.highest, scores.max(-1))
        weights = jnp.exp(scores - highest[..., None])
        shrink = jnp.exp(before.highest - highest)
        added = wide_einsum("bkrqs,bskd->bkrqd", weights.astype(v.dtype), share.keys(v, first))
        after = _RunningSoftmax(
            highest=highest,
            total=shrink * before.total + weights.sum(-1),
            context=shrink[..., None] * before.context + added,
        )
        return jax.tree.map(lambda array, part: array.at[half].set(part), running, after)

    dtype, sinks = wide_dtype(q.dtype), share.sinks(q.dtype)
    nothing = _RunningSoftmax(
        highest=jnp.broadcast_to(jnp.finfo(dtype).min if sinks is None else sinks, q.shape[:-1]).astype(dtype),
        total=jnp.full(q.shape[:-1], 0 if sinks is None else 1, dtype),  # a sink's weight relative to itself
        context=jnp.zeros(q.shape, dtype),
    )
    all_keys = share.for_each_block(visit, nothing)
    context = share.join(all_keys.context / all_keys.total[..., None]).astype(inputs.query.dtype)
    context, log_total = checkpoint_name((context, all_keys.highest + jnp.log(all_keys.total)), saved_as)
    return context, _Residuals(AttentionResiduals(inputs, context, log_total), rules)


class _Gradients(NamedTuple):
    """Sums of gradients over the blocks seen so far, in float32 at least."""

    query: Halves
    key: Keys
    value: Keys


def _backward(
    axes: Axes, saved_as: str, residuals: _Residuals, d_context: LocalHeads
) -> tuple[AttentionInputs, ScoreRules]:
    (inputs, context, log_total), rules = residuals
    share = _share_of(inputs, rules, axes)
    q = share.split(inputs.query)
    k, v = gather_sequence(inputs.key, axes), gather_sequence(inputs.value, axes)
    d_c = share.split(d_context)
    dtype = wide_dtype(q.dtype)
    # What softmax's derivative subtracts in each row: sum_k weight d_weight = context . d_context.
    inner = (share.split(context).astype(dtype) * d_c.astype(dtype)).sum(-1)

    def visit(half: Array, first: Array, total: _Gradients) -> _Gradients:
        q_half, d_half, k_block, v_block = q[half], d_c[half], share.keys(k, first), share.keys(v, first)
        capped = share.capped(q_half, k_block)
        weights = jnp.exp(share.masked(capped, half, first) - log_total[half][..., None])
        d_weights = wide_einsum("bkrqd,bskd->bkrqs", d_half, v_block)
        d_capped = share.scale * weights * (d_weights - inner[half][..., None])
        d_scores = share.rules.through_cap(d_capped, capped).astype(q.dtype)
        d_query = total.query.at[half].add(wide_einsum("bkrqs,bskd->bkrqd", d_scores, k_block))
        d_key = wide_einsum("bkrqs,bkrqd->bskd", d_scores, q_half)
        d_value = wide_einsum("bkrqs,bkrqd->bskd", weights.astype(d_half.dtype), d_half)
        return _Gradients(
            query=d_query,
            key=share.add_to_keys(total.key, d_key, first),
            value=share.add_to_keys(total.value, d_value, first),
        )

    zeros = _Gradients(query=jnp.zeros(q.shape, dtype), key=jnp.zeros(k.shape, dtype), value=jnp.zeros(v.shape, dtype))
    total = share.for_each_block(visit, zeros)
    gradients = AttentionInputs(
        key=_scatter_sequence(total.key, axes).astype(inputs.key.dtype),
        value=_scatter_sequence(total.value, axes).astype(inputs.key.dtype),
        query=share.join(total.query).astype(inputs.query.dtype),
        segment_ids=None,
    )
    sinks, d_sinks = share.sinks(q.dtype), None
    if sinks is not None:
        of_each = (jnp.exp(sinks - log_total) * inner).sum((0, 1, 4))
        d_sinks = -of_each.reshape(-1).astype(rules.sinks.dtype)  # jax.shard_map adds those of all devices up
    return gradients, rules.gradient(d_sinks)


def _scatter_sequence(x: Keys, axes: Axes) -> Float[Array, "batch local kv_heads head_dim"]:
    """The gradient of gather_sequence: summed over the devices, each keeps its own stretch."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True)


_attend.defvjp(_forward, _backward)
