"""What a model says when it reads one token after the other."""

from functools import partial

import jax
import jax.numpy as jnp

import hybridnorm_jax as hn
from hybridnorm_jax.model.cache import CACHE, Slots, empty_cache


@partial(jax.jit, static_argnames=("config", "prompt", "slots"))
def at_once_and_step_by_step(config, params, tokens, *, prompt=0, slots=None):
    """((logits, cache) of a pass over all tokens, the same of `prompt` tokens at once and the others one by one)."""
    model = hn.Decoder(config)
    batch, length = tokens.shape
    slots = length if slots is None else slots
    start = jnp.zeros(batch, jnp.int32)

    def read(cache, tokens, place):
        positions = jnp.broadcast_to(place + jnp.arange(tokens.shape[1]), tokens.shape)
        logits, new = model.apply(
            {"params": params, CACHE: cache},
            tokens,
            positions=positions,
            slots=Slots(next=place, first=start),
            mutable=[CACHE],
        )
        return new[CACHE], logits

    def step(cache, place):
        cache, logits = read(cache, jax.lax.dynamic_slice_in_dim(tokens, place, 1, axis=1), place)
        return cache, logits[:, 0]

    cache, logits = read(empty_cache(config, batch=batch, slots=slots), tokens, jnp.asarray(0))
    stepped, columns = empty_cache(config, batch=batch, slots=slots), []
    if prompt:
        stepped, first = read(stepped, tokens[:, :prompt], jnp.asarray(0))
        columns.append(first)
    stepped, others = jax.lax.scan(step, stepped, jnp.arange(prompt, length))
    columns.append(others.swapaxes(0, 1))
    return (logits, cache), (jnp.concatenate(columns, axis=1), stepped)
