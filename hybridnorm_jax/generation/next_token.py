"""How the next token is chosen from a model's logits: the rules that Sampling names, as functions."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.generation.sampling import Sampling

Logits = Float[Array, "batch vocab"]


def choose(
    logits: Logits, keys: Key[Array, " batch"], sampling: Sampling, *, came: Bool[Array, "batch vocab"] | None = None
) -> Int[Array, " batch"]:
    """The next token of every sequence; each draws from its own key.

    Args:
      came: which tokens came before in each sequence; needed for a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, present(came), sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest logit becomes 0, so that no temperature makes it infinite. Numbers below `tiny` may be read as 0.
    temperature = max(sampling.temperature, float(jnp.finfo(logits.dtype).tiny))
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return jax.vmap(functools.partial(jax.random.categorical, axis=-1))(keys, logits).astype(jnp.int32)


def penalize(logits: Logits, came: Bool[Array, "batch vocab"], penalty: float) -> Logits:
    """Of tokens that came: logit / penalty where it is positive, logit * penalty elsewhere. CTRL (1909.05858)."""
    return jnp.where(came, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Logits, k: int) -> Logits:
    """The k largest logits and their equals; -inf elsewhere."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """The smallest set of likeliest tokens with probability p or more, and their equals; -inf elsewhere.

    Source: nucleus sampling (1904.09751).
    """
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(descending)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """The tokens that are at least p times as likely as the likeliest; -inf elsewhere. Source: min-p (2407.01082)."""
    return jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)
