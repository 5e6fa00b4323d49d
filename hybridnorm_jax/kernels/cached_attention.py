"""Attention of one new token to the tokens before it, whose keys and values are kept. In plain JAX, on any platform."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.kernels.precision import wide_dtype, wide_einsum
from hybridnorm_jax.kernels.score_rules import PLAIN, ScoreRules

# A product over the slots of one head reads memory in order. Slots come last because XLA lays memory of a TPU out in
# rows of 128: slots fill these, and the channels of a small head would not.
CachedHeads = Float[Array, "batch kv_heads head_dim slots"]
# A block is copied before it is used, on a CPU at least, so a full cache is read twice as fast without blocks.
FEW_SLOTS, BLOCKS = 4096, 8


def blocks_of(slots: int) -> int:
    """In how many blocks so many slots are read."""
    return 1 if slots < FEW_SLOTS else BLOCKS


def cached_attention(
    query: Float[Array, "batch 1 heads head_dim"],
    key: CachedHeads,
    value: CachedHeads,
    *,
    first: Int[Array, " batch"],
    last: Int[Array, ""],
    rules: ScoreRules = PLAIN,
) -> Float[Array, "batch 1 heads head_dim"]:
    """softmax(z) v over the slots first, ..., last, in the query's dtype; the softmax in float32 at least.

    Query head h reads key and value head h // (heads / kv_heads), each read once for all of its query heads. Few slots
    are all read. Many are read in blocks, and no block behind `last`: so a token costs what is filled, and the program
    knows no length. A GPU reads all of them: there a loop whose length depends on the data waits for the host in every
    turn.

    Args:
      key, value: what is in slots that are not read may be anything finite.
      first: of each sequence.
      last: of all sequences, at least each first. The query's own key is there.
      rules: what z is of q k^T. Positions of keys are counted from `first`, whatever its alibi says.
    """
    if (blocks := blocks_of(key.shape[-1])) == 1:
        return attend_at_once(query, key, value, first, last, rules)
    in_blocks = partial(attend_in_blocks, blocks=blocks)
    return jax.lax.platform_dependent(
        query, key, value, first, last, rules, cuda=attend_at_once, rocm=attend_at_once, default=in_blocks
    )


def attend_at_once(
    query: Float[Array, "batch 1 heads head_dim"],
    key: CachedHeads,
    value: CachedHeads,
    first: Int[Array, " batch"],
    last: Int[Array, ""],
    rules: ScoreRules = PLAIN,
) -> Float[Array, "batch 1 heads head_dim"]:
    """`cached_attention`, reading all slots."""
    slot = jnp.arange(key.shape[-1])
    seen = _seen(slot, first[:, None], last, rules)
    grouped = _grouped(query, key)
    scores = _scores(grouped, key, seen, slot, first, last, rules)
    if rules.sinks is None:
        weights = jax.nn.softmax(scores)
    else:
        sinks = jnp.broadcast_to(rules.sinks_in(query.dtype, _of_heads(grouped)), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1))[..., :-1]
    context = wide_einsum("bkgs,bkds->bkgd", weights.astype(value.dtype), value)
    return context.reshape(query.shape).astype(query.dtype)


def attend_in_blocks(
    query: Float[Array, "batch 1 heads head_dim"],
    key: CachedHeads,
    value: CachedHeads,
    first: Int[Array, " batch"],
    last: Int[Array, ""],
    rules: ScoreRules = PLAIN,
    *,
    blocks: int,
) -> Float[Array, "batch 1 heads head_dim"]:
    """`cached_attention` in so many blocks. A block's weights are relative to the highest score so far.

    Source: FlashAttention (2205.14135).
    """
    slots = key.shape[-1]
    block = -(-slots // blocks)
    grouped = _grouped(query, key)
    wide = wide_dtype(query.dtype)

    def add_block(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, context = sums
        # The last block may begin earlier, so as not to end behind the cache. What it repeats is hidden.
        start = jnp.minimum(number * block, slots - block)
        keys, values = (jax.lax.dynamic_slice_in_dim(cache, start, block, axis=3) for cache in (key, value))
        slot = start + jnp.arange(block)
        seen = _seen(slot, jnp.maximum(first[:, None], number * block), last, rules)
        scores = _scores(grouped, keys, seen, slot, first, last, rules)
        higher = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - higher[..., None]), 0)
        shrink = jnp.exp(highest - higher)
        return (
            higher,
            total * shrink + weights.sum(-1),
            context * shrink[..., None] + wide_einsum("bkgs,bkds->bkgd", weights.astype(values.dtype), values),
        )

    lowest = jnp.full(grouped.shape[:-1], jnp.finfo(wide).min, wide)
    sums = (lowest, jnp.zeros_like(lowest), jnp.zeros(grouped.shape, wide))
    if rules.sinks is not None:
        sinks = jnp.broadcast_to(rules.sinks_in(query.dtype, _of_heads(grouped)[:-1]), lowest.shape)
        sums = (sinks.astype(wide), jnp.ones_like(lowest), jnp.zeros(grouped.shape, wide))
    # Blocks in which no sequence has begun are passed over, and those before the window.
    begin = first.min()
    for window in (rules.window, rules.layer_window):
        begin = begin if window is None else jnp.maximum(begin, last - window + 1)
    _, total, context = jax.lax.fori_loop(begin // block, last // block + 1, add_block, sums)
    return (context / total[..., None]).reshape(query.shape).astype(query.dtype)


def _grouped(
    query: Float[Array, "batch 1 heads head_dim"], key: CachedHeads
) -> Float[Array, "batch kv_heads group head_dim"]:
    """The query heads beside the key head that they read."""
    batch, _, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    return query.reshape(batch, kv_heads, heads // kv_heads, head_dim)


def _of_heads(grouped: Float[Array, "batch kv_heads group head_dim"]) -> tuple[int, int, int]:
    """The shape of one number of each head, beside scores."""
    return (*grouped.shape[1:3], 1)


def _seen(
    slot: Int[Array, " block"], first: Int[Array, "batch 1"], last: Int[Array, ""], rules: ScoreRules
) -> Bool[Array, "batch block"]:
    seen = (slot >= first) & (slot <= last)
    visible = rules.visible(last, slot)
    return seen if visible is None else seen & visible


def _scores(
    grouped: Float[Array, "batch kv_heads group head_dim"],
    keys: Float[Array, "batch kv_heads head_dim block"],
    seen: Bool[Array, "batch block"],
    slot: Int[Array, " block"],
    first: Int[Array, " batch"],
    last: Int[Array, ""],
    rules: ScoreRules,
) -> Float[Array, "batch kv_heads group block"]:
    """The scores of a block; those of slots that are not seen are lower than any other."""
    scores = rules.capped(rules.scale_of(keys.shape[-2]) * wide_einsum("bkgd,bkds->bkgs", grouped, keys))
    if rules.alibi is not None:
        positions = (slot - first[:, None])[:, None, None]
        added = rules.alibi.added(_of_heads(grouped), query=last, key=slot, key_position=positions)
        scores = scores + added.astype(scores.dtype)
    return jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
