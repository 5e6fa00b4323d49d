"""Causal attention over grouped heads, and the choice of what computes it: xla (ours), cudnn (GPU), splash (TPU)."""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hybridnorm_jax.attention_splash import splash_attention
from hybridnorm_jax.config import ATTENTION_BACKENDS, check, check_choice
from hybridnorm_jax.sequence_parallel import on_mesh, sequence_axes, zigzag_attention

# jax.checkpoint_policies.save_only_these_names(SAVED) keeps what the backward pass of xla and splash needs besides
# q, k and v: the context and, per query, the logarithm of the softmax's denominator.
SAVED = "attention_residuals"

Heads = Float[Array, "batch seq heads head_dim"]
KeyValueHeads = Float[Array, "batch seq kv_heads head_dim"]
SegmentIds = Int[Array, "batch seq"] | None


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What a fused kernel can do."""

    platform: str
    dtypes: tuple[str, ...]
    segment_ids: bool
    head_dim_step: int
    head_dim_max: int


_LIMITS = {
    # On Hopper and later cuDNN goes to head_dim 256.
    "cudnn": _Limits("gpu", ("bfloat16", "float16"), segment_ids=False, head_dim_step=8, head_dim_max=128),
    "splash": _Limits("tpu", ("bfloat16", "float32"), segment_ids=True, head_dim_step=8, head_dim_max=256),
}


def resolve_backend(name: str, *, platform: str | None, dtype: Any, head_dim: int, segment_ids: bool) -> str:
    """The backend that `name` stands for: itself, or for "auto" the fused kernel of the platform where it fits, or xla.

    Args:
      name: auto | xla | cudnn | splash.
      platform: of the devices that will run it: cpu | gpu | tpu; None for a named backend: not checked.
      dtype: of q, k and v.
      segment_ids: whether there are any.

    Raises:
      ConfigError: the named backend cannot do this; the message says why.
    """
    check_choice("model.attention", name, ATTENTION_BACKENDS)
    obstacle = functools.partial(_obstacle, platform=platform, dtype=dtype, head_dim=head_dim, segment_ids=segment_ids)
    if name == "auto":
        return next((fused for fused in _LIMITS if obstacle(fused) is None), "xla")
    reason = obstacle(name)
    check(reason is None, "model.attention", name, f"{reason}; use auto or xla")
    return name


def _obstacle(name: str, platform: str | None, dtype: Any, head_dim: int, segment_ids: bool) -> str | None:
    """Why this backend cannot do it, or None."""
    if name == "xla":
        return None
    limits = _LIMITS[name]
    if platform not in (None, limits.platform):
        return f"needs platform {limits.platform}, this is {platform}"
    if jnp.dtype(dtype).name not in limits.dtypes:
        return f"needs model.dtype {' or '.join(limits.dtypes)}, not {jnp.dtype(dtype).name}"
    if segment_ids and not limits.segment_ids:
        return "has no segment ids, data.segment_ids=true needs them"
    if head_dim % limits.head_dim_step or head_dim > limits.head_dim_max:
        multiple = f"a multiple of {limits.head_dim_step} up to {limits.head_dim_max}"
        return f"needs model.head_dim {multiple}, not {head_dim}"
    return None


def causal_attention(
    query: Heads, key: KeyValueHeads, value: KeyValueHeads, *, segment_ids: SegmentIds = None, backend: str = "xla"
) -> Heads:
    """softmax(q k^T / sqrt(head_dim) + mask) v, in the query's dtype; the softmax in float32 at least.

    Query head h reads key and value head h // (heads / kv_heads). A token sees itself and earlier tokens, of its own
    segment only where segment_ids are given. Reverse-mode differentiable. On a mesh that splits the sequence, xla and
    splash compute it in shares of equal work (sequence_parallel.py); cudnn gathers the sequence.

    Args:
      backend: as in resolve_backend. "auto" asks for the default platform; a named backend is taken at its word, so
        that one can compile for a platform that is not here.

    Raises:
      ConfigError: the named backend cannot do this.
    """
    backend = resolve_backend(
        backend,
        platform=jax.default_backend() if backend == "auto" else None,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        segment_ids=segment_ids is not None,
    )
    match backend:
        case "xla":
            if axes := sequence_axes(query.shape[1]):
                local = functools.partial(zigzag_attention, axes=axes, saved_as=SAVED)
                return on_mesh(local, query, key, value, segment_ids, sequence=axes)
            return _blockwise(query, key, value, segment_ids)
        case "cudnn":
            return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
        case "splash":
            return splash_attention(query, key, value, segment_ids, saved_as=SAVED)


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
def _blockwise(query: Heads, key: KeyValueHeads, value: KeyValueHeads, segment_ids: SegmentIds) -> Heads:
    return _blockwise_forward(query, key, value, segment_ids)[0]


def _blockwise_forward(query, key, value, segment_ids):
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


def _blockwise_backward(residuals, d_context):
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


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
