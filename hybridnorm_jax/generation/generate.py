"""Text from a model, as tokens: each after all tokens before it, whose keys and values are kept."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.generation.decoding import Writing, read_prompts, write
from hybridnorm_jax.generation.on_mesh import on_mesh_of, with_auto_axes
from hybridnorm_jax.generation.ready_parameters import ready
from hybridnorm_jax.generation.request import Request, Tokens, checked_request
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.mesh.device_room import room_of
from hybridnorm_jax.model.cache import bytes_of_cache
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.program_lengths import rounded_up

# Most tokens that are written before the caller sees them, and seconds for which a reader is willing to wait.
STRIDE, PATIENCE = 32, 0.1


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int] | Tokens],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    seeds: int | Sequence[int] = 0,
    on_tokens: Callable[[list[Tokens]], bool | None] | None = None,
) -> list[Tokens]:
    """Go on from each prompt, token by token.

        (new,) = hn.generate(config, params, [prompt], max_new_tokens=100)

    The prompts are read at once. Then each token costs one pass over the parameters and over the keys and values of the
    tokens before it. Room is made for batch * slots * kv_heads * head_dim * 2 * layers numbers of the compute dtype,
    slots = rounded_up(rounded_up(longest prompt) + max_new_tokens): programs are compiled for rounded lengths alone.

    Args:
      params: of Decoder(config); they may lie on a mesh. Each call makes a copy that suits it (ready_parameters.ready),
        unless that is what it is given.
      prompts: the tokens of each, at least one; their lengths may differ.
      max_new_tokens: at most so many are written after each prompt.
      sampling: how tokens are chosen; None: always the likeliest.
      stop_ids: a sequence ends with the first of these tokens, which is returned too.
      seeds: of each sequence, or one from which all are made, below 2^32. A sequence does not depend on those beside it
        but for rounding.
      on_tokens: is called with the newest tokens of all sequences, about ten times a second; generation ends where it
        returns True.

    Returns:
      The new tokens of each sequence.

    Raises:
      UserError: an argument that cannot be, or needs more memory than there is; the message names it.
    """
    sampling = Sampling() if sampling is None else sampling
    request = checked_request(config, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seeds=seeds)
    rows = request.rows
    # Plain attention takes any length, and XLA cannot split a Pallas kernel over the devices of the parameters.
    plain = dataclasses.replace(config, attention="xla", expert_dispatch="blocked", remat="none")
    model = Decoder(plain, unrolled=True)
    width = rounded_up(max(len(row) for row in rows))
    params = with_auto_axes(params)
    with on_mesh_of(params) as parts:
        params = ready(config, params)
        (device, *_) = devices = jax.tree.leaves(params)[0].devices()
        stops, keys = jnp.asarray(request.ends), _keys(request.seeds, len(rows))
        # Rows that are added are empty, and have ended.
        batch = -(-max(len(rows), least_rows(config, device)) // parts) * parts
        slots = rounded_up(width + request.max_new_tokens)
        # No mesh splits the cache more than over all devices.
        _check_room(bytes_of_cache(config, batch=batch, slots=slots) // len(devices), device, request.max_new_tokens)
        with _memory_of_prompts(rows):
            writing = read_prompts(
                model,
                params,
                jnp.asarray(_right_aligned(rows, batch, width)),
                jnp.asarray([len(row) for row in rows] + [0] * (batch - len(rows))),
                keys[jnp.minimum(jnp.arange(batch), len(rows) - 1)],
                stops,
                slots=slots,
                sampling=sampling,
            )
            jax.block_until_ready(writing.last)
        write_more = partial(write, model, params, stops=stops, most=STRIDE, sampling=sampling)
        return _collect(write_more, writing, request, on_tokens)


def least_rows(config: ModelConfig, device: jax.Device) -> int:
    """How many sequences are written at least.

    XLA for GPUs writes out all products of a matrix with a single vector before it sums them. With two vectors it does
    not, and a step moves half as much memory. But where there are experts, a second vector would read more of them.
    """
    return 2 if device.platform == "gpu" and not config.num_experts else 1


def _right_aligned(rows: list[np.ndarray], batch: int, width: int) -> Int[np.ndarray, "batch width"]:
    array = np.zeros((batch, width), np.int32)
    for number, row in enumerate(rows):
        array[number, width - len(row) :] = row
    return array


def _collect(
    write_more: Callable[..., tuple[Writing, jax.Array, jax.Array]],
    writing: Writing,
    request: Request,
    on_tokens: Callable[[list[Tokens]], bool | None] | None,
) -> list[Tokens]:
    """All tokens of the sequences that are asked for, in the order of writing; given to on_tokens on the way.

    Args:
      write_more: decoding.write, of which the sequences and `limit` are left to give.
    """
    rows, ends = len(request.rows), request.ends
    columns = np.asarray(writing.last)[:rows, None]
    pieces = [columns]
    is_done = np.zeros(rows, bool)
    stride = STRIDE if on_tokens is None else 1
    while True:
        new = [column[: _length(column, ends, done)] for column, done in zip(columns, is_done, strict=True)]
        if on_tokens is not None and on_tokens(new):
            break
        is_done |= np.isin(columns, ends).any(1)
        left = request.max_new_tokens - sum(piece.shape[1] for piece in pieces)
        if left == 0 or is_done.all():
            break
        began = time.monotonic()
        writing, tokens, written = write_more(writing=writing, limit=jnp.asarray(min(left, stride)))
        columns = np.asarray(tokens)[:rows, : int(written)]
        if on_tokens is not None:
            stride = _next_stride(stride, time.monotonic() - began)
        pieces.append(columns)
    every = np.concatenate(pieces, axis=1)
    return [row[: _length(row, ends, done=False)] for row in every]


def _next_stride(stride: int, seconds: float) -> int:
    """How many tokens to write at once, after so many took so long: about PATIENCE's worth."""
    if seconds < PATIENCE / 2:
        return min(2 * stride, STRIDE)
    return max(stride // 2, 1) if seconds > PATIENCE else stride


def _length(tokens: Tokens, ends: Tokens, done: bool) -> int:
    """How many of these tokens belong to a sequence: up to the first that ends it; none if it has ended before."""
    if done:
        return 0
    places = np.flatnonzero(np.isin(tokens, ends))
    return int(places[0]) + 1 if len(places) else len(tokens)


def _keys(seeds: int | list[int], batch: int) -> jax.Array:
    if isinstance(seeds, int):
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seeds), jnp.arange(batch))
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def _check_room(size: int, device: jax.Device, max_new_tokens: int) -> None:
    room = room_of(device)
    if room is not None and size > room:
        needed, there = (f"{number / 2**30:,.1f} GiB" for number in (size, room))
        right = f"need {needed} of a device, which has {there}; ask for fewer tokens, or give fewer prompts"
        raise UserError(f"max_new_tokens={max_new_tokens}: the keys and values of so many {right}")


@contextlib.contextmanager
def _memory_of_prompts(rows: list[np.ndarray]) -> Iterator[None]:
    """Where a device lacks memory for what is inside, say that the prompts are too long."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        longest = max(len(row) for row in rows)
        wrong = f"{len(rows)} of up to {longest:,} tokens need more memory than a device has"
        right = "shorten them (half the length needs a quarter of the memory), or give fewer"
        raise UserError(f"prompts: {wrong}; {right}") from error
