"""Text from a model, as tokens: each after all tokens before it, whose keys and values are kept."""

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.generation.decoding import Writing, read_prompts, write
from hybridnorm_jax.generation.on_mesh import on_mesh_of, with_auto_axes
from hybridnorm_jax.generation.ready_parameters import ready
from hybridnorm_jax.generation.sampling import Sampling, fault_of_seed
from hybridnorm_jax.mesh.device_room import room_of
from hybridnorm_jax.model.cache import bytes_of_cache
from hybridnorm_jax.model.config import LONGEST_CONTEXT, ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.program_lengths import rounded_up

Tokens = Int[np.ndarray, " tokens"]
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
    rows = [_integers(f"prompts[{number}]", prompt) for number, prompt in enumerate(prompts)]
    ends = _integers("stop_ids", stop_ids)
    max_new_tokens = _integer("max_new_tokens", max_new_tokens)
    _check(config, rows, max_new_tokens)
    _check_tokens("stop_ids", ends, config)
    numbers = _seeds(seeds, len(rows))
    # Plain attention takes any length, and XLA cannot split a Pallas kernel over the devices of the parameters.
    plain = dataclasses.replace(config, attention="xla", expert_dispatch="blocked", remat="none")
    model = Decoder(plain, unrolled=True)
    width = rounded_up(max(len(row) for row in rows))
    params = with_auto_axes(params)
    with on_mesh_of(params) as parts:
        params = ready(config, params)
        (device, *_) = devices = jax.tree.leaves(params)[0].devices()
        stops, keys = jnp.asarray(ends, jnp.int32), _keys(numbers, len(rows))
        # Rows that are added are empty, and have ended.
        batch = -(-max(len(rows), least_rows(config, device)) // parts) * parts
        slots = rounded_up(width + max_new_tokens)
        # No mesh splits the cache more than over all devices.
        _check_room(bytes_of_cache(config, batch=batch, slots=slots) // len(devices), device, max_new_tokens)
        with _memory_of_prompts(rows):
            writing = jax.block_until_ready(
                read_prompts(
                    model,
                    params,
                    jnp.asarray(_right_aligned(rows, batch, width)),
                    jnp.asarray([len(row) for row in rows] + [0] * (batch - len(rows))),
                    keys[jnp.minimum(jnp.arange(batch), len(rows) - 1)],
                    stops,
                    slots=slots,
                    sampling=sampling,
                )
            )
        write_more = partial(write, model, params, stops=stops, most=STRIDE, sampling=sampling)
        return _collect(write_more, writing, ends, rows=len(rows), max_new_tokens=max_new_tokens, on_tokens=on_tokens)


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
    ends: Tokens,
    *,
    rows: int,
    max_new_tokens: int,
    on_tokens: Callable[[list[Tokens]], bool | None] | None,
) -> list[Tokens]:
    """All tokens of the first `rows` sequences, in the order of writing; given to on_tokens on the way.

    Args:
      write_more: decoding.write, of which the sequences and `limit` are left to give.
      ends: the tokens that end a sequence.
    """
    columns = np.asarray(writing.last)[:rows, None]
    pieces = [columns]
    is_done = np.zeros(len(columns), bool)
    stride = STRIDE if on_tokens is None else 1
    while True:
        new = [column[: _length(column, ends, done)] for column, done in zip(columns, is_done, strict=True)]
        if on_tokens is not None and on_tokens(new):
            break
        is_done |= np.isin(columns, ends).any(1)
        left = max_new_tokens - sum(piece.shape[1] for piece in pieces)
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


def _seeds(seeds: Any, batch: int) -> int | list[int]:
    """The seeds as integers of Python.

    Raises:
      UserError: one that cannot be, or there are fewer or more than prompts.
    """
    if not np.ndim(seeds):
        return _seed(seeds)
    if len(seeds) != batch:
        raise UserError(f"seeds: {len(seeds)} of them for {batch} prompts; give one of each, or one for all")
    return [_seed(seed) for seed in seeds]


def _seed(seed: Any) -> int:
    number = _integer("seed", seed)
    if (wrong := fault_of_seed(number)) is not None:
        raise UserError(f"seed {number}: {wrong}")
    return number


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{name}={value!r}: must be a whole number") from error


def _integers(name: str, values: Any) -> Int[np.ndarray, "..."]:
    """The ids of tokens, as they are given: a sequence, a set or an array."""
    try:
        array = np.asarray(sorted(values) if isinstance(values, set | frozenset) else values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: must be a list of whole numbers, the ids of tokens") from error
    if array.dtype.kind not in "iu" and array.size:
        raise UserError(f"{name}: must be whole numbers, the ids of tokens, not {array.dtype}")
    return array


def _check(config: ModelConfig, rows: list[np.ndarray], max_new_tokens: int) -> None:
    if not 1 <= max_new_tokens <= LONGEST_CONTEXT:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1 and at most {LONGEST_CONTEXT:,}")
    if not rows:
        raise UserError("prompts: there are none; give at least one")
    for number, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise UserError(f"prompts[{number}]: must be a list of at least one token; begin with the separator")
        _check_tokens(f"prompts[{number}]", row, config)
    longest = max(len(row) for row in rows)
    if config.positions == "learned" and longest + max_new_tokens - 1 > present(config.max_positions):
        right = f"model.max_positions={config.max_positions}; shorten the prompt or ask for fewer"
        raise UserError(f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit {right}")


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


def _check_tokens(name: str, tokens: np.ndarray, config: ModelConfig) -> None:
    unknown = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(unknown):
        raise UserError(f"{name}: token {unknown[0]} is not in the vocabulary of {config.vocab_size:,}")
