"""The two compiled functions of generation: reading the prompts, and writing one token after another."""

from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from hybridnorm_jax.generation.next_token import choose
from hybridnorm_jax.generation.on_mesh import readable
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.model.cache import CACHE, Slots, empty_cache
from hybridnorm_jax.model.decoder import Decoder


@flax.struct.dataclass
class Writing:
    """Sequences that are being written.

    Attributes:
      cache: the keys and values of all their tokens but the last.
      slots: where the last tokens go.
      last: the newest token of every sequence.
      is_done: which sequences have ended.
      count: how many tokens were written to each, or would have been if it had not ended.
      keys: of every sequence; its token number i is drawn from fold_in(key, i).
      came: which tokens are in each sequence; None where nobody asks.
    """

    cache: Any
    slots: Slots
    last: Int[Array, " batch"]
    is_done: Bool[Array, " batch"]
    count: Int[Array, ""]
    keys: Key[Array, " batch"]
    came: Bool[Array, "batch vocab"] | None


@partial(jax.jit, static_argnames=("model", "slots", "sampling"))
def read_prompts(
    model: Decoder,
    params: Any,
    prompts: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    stops: Int[Array, " stops"],
    *,
    slots: int,
    sampling: Sampling,
) -> Writing:
    """Read the prompts, and write the first token after each.

    Args:
      prompts: each at the right end of its row; what stands before it does not matter.
      lengths: of the prompts. A sequence without a prompt, 0, has ended.
      stops: tokens that end a sequence.
      slots: of the cache, at least those of the prompts.
    """
    batch, width = prompts.shape
    first = width - lengths
    places = jnp.arange(width)
    is_prompt = places >= first[:, None]
    variables = {"params": params, CACHE: empty_cache(model.config, batch=batch, slots=slots)}
    hidden, cache = model.apply(
        variables,
        jnp.where(is_prompt, prompts, 0),
        positions=jnp.maximum(places - first[:, None], 0),
        segment_ids=is_prompt.astype(jnp.int32),
        slots=Slots(next=jnp.asarray(0), first=first),
        return_hidden=True,
        mutable=[CACHE],
    )
    logits = model.apply({"params": params}, hidden[:, -1:], method="logits")[:, 0]
    came = None
    if sampling.repetition_penalty != 1:
        rows = jnp.arange(batch)[:, None]
        came = jnp.zeros(logits.shape, bool).at[rows, jnp.where(is_prompt, prompts, prompts[:, -1:])].set(True)
    token = readable(choose(logits, _fold_in(keys, 0), sampling, came=came))
    return Writing(
        cache=cache[CACHE],
        slots=Slots(next=jnp.asarray(width), first=first),
        last=token,
        is_done=jnp.isin(token, stops) | (lengths == 0),
        count=jnp.asarray(1),
        keys=keys,
        came=_with(came, token),
    )


@partial(jax.jit, static_argnames=("model", "most", "sampling"), donate_argnames="writing")
def write(
    model: Decoder,
    params: Any,
    writing: Writing,
    stops: Int[Array, " stops"],
    limit: Int[Array, ""],
    *,
    most: int,
    sampling: Sampling,
) -> tuple[Writing, Int[Array, "batch most"], Int[Array, ""]]:
    """Write up to `limit` tokens to each sequence, until all have ended.

    Args:
      limit: at most `most`; another value does not compile anew.

    Returns:
      (the sequences, what was written in the first columns, how many columns that are).
    """
    batch = writing.last.shape[0]

    def goes_on(state: tuple[Writing, Array, Array]) -> Array:
        writing, _, written = state
        return (written < limit) & ~writing.is_done.all()

    def step(state: tuple[Writing, Array, Array]) -> tuple[Writing, Array, Array]:
        writing, tokens, written = state
        writing = _write_one(model, params, writing, stops, sampling)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, writing.last[:, None], written, axis=1)
        return writing, tokens, written + 1

    start = (writing, jnp.zeros((batch, most), jnp.int32), jnp.zeros((), jnp.int32))
    writing, tokens, written = jax.lax.while_loop(goes_on, step, start)
    return writing, readable(tokens), readable(written)


def _write_one(
    model: Decoder, params: Any, writing: Writing, stops: Int[Array, " stops"], sampling: Sampling
) -> Writing:
    slots = writing.slots
    logits, cache = model.apply(
        {"params": params, CACHE: writing.cache},
        writing.last[:, None],
        positions=(slots.next - slots.first)[:, None],
        slots=slots,
        mutable=[CACHE],
    )
    token = readable(choose(logits[:, 0], _fold_in(writing.keys, writing.count), sampling, came=writing.came))
    token = jnp.where(writing.is_done, writing.last, token)
    return writing.replace(
        cache=cache[CACHE],
        slots=slots.replace(next=slots.next + 1),
        last=token,
        is_done=writing.is_done | jnp.isin(token, stops),
        count=writing.count + 1,
        came=_with(writing.came, token),
    )


def _fold_in(keys: Key[Array, " batch"], number: Int[Array, ""] | int) -> Key[Array, " batch"]:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def _with(came: Bool[Array, "batch vocab"] | None, token: Int[Array, " batch"]) -> Bool[Array, "batch vocab"] | None:
    return None if came is None else came.at[jnp.arange(token.shape[0]), token].set(True)
