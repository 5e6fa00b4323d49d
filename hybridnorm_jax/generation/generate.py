"""Text from a model, as tokens: each after all tokens before it, whose keys and values are kept."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Int

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.generation.decoding import LogicalRules, Program, Writing, read_prompts, write
from hybridnorm_jax.generation.sampling import Sampling
from hybridnorm_jax.mesh.device_mesh import parts_of, use_mesh
from hybridnorm_jax.mesh.sharding_rules import MESH_AXES
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder

Tokens = Int[np.ndarray, " tokens"]
OnTokens = Callable[[list[Tokens]], bool | None]

# Tokens that are written before this process looks at them: fewer where somebody waits for each.
STRIDE, STRIDE_OF_A_LISTENER = 64, 8
# Programs are compiled for no shorter lengths.
SHORTEST = 32
LARGEST_SEED = 2**32 - 1


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int] | Tokens],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    seeds: int | Sequence[int] = 0,
    on_tokens: OnTokens | None = None,
) -> list[Tokens]:
    """Go on from each prompt, token by token.

        (new,) = hn.generate(config, params, [prompt], max_new_tokens=100)

    The prompts are read at once. Then each token costs one pass over the parameters, and over the keys and values of
    the tokens before it. Those take batch * slots * kv_heads * head_dim * 2 * layers numbers of the compute dtype.
    `slots` is rounded_up(rounded_up(longest prompt) + max_new_tokens): programs are compiled for such lengths only.

    Args:
      params: of Decoder(config). Where they lie on a mesh (hn.make_mesh), it is computed there, by the rules in force,
        see hn.use_mesh; all processes of the mesh must ask for the same.
      prompts: the tokens of each, at least one; their lengths may differ.
      max_new_tokens: at most so many are written after each prompt.
      sampling: how tokens are chosen; None: always the likeliest.
      stop_ids: a sequence ends with the first of these tokens, which is returned too.
      seeds: of each sequence; a number is the first one's, and they count up from it. What a sequence becomes depends
        on its prompt and its seed, and not on those beside it but for rounding.
      on_tokens: is called with the newest tokens of every sequence, none of one that has ended, every few tokens;
        generation ends where it returns True.

    Returns:
      The new tokens of each sequence.

    Raises:
      UserError: what is asked for cannot be; names the argument.
    """
    sampling = Sampling() if sampling is None else sampling
    rows = [np.asarray(prompt, np.int64) for prompt in prompts]
    _check(config, rows, max_new_tokens, stop_ids)
    # Plain attention takes any length, and XLA cannot split a Pallas kernel over the devices of the parameters.
    model = Decoder(dataclasses.replace(config, attention="xla", expert_dispatch="blocked", remat="none"))
    width = rounded_up(max(len(row) for row in rows))
    stops = np.asarray(stop_ids, np.int32)
    with _mesh_of(params) as rules:
        batch = _batch_size(len(rows), rules)
        program = Program(model, rounded_up(width + max_new_tokens), sampling, rules)
        padded, lengths = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        for number, row in enumerate(rows):
            padded[number, width - len(row) :] = row
            lengths[number] = len(row)
        writing = read_prompts(params, padded, lengths, _seeds(seeds, len(rows), batch), stops, program=program)
        collected = _Collected(stops, on_tokens, is_done=np.zeros(len(rows), bool))
        return collected.all_of(params, writing, program, max_new_tokens)


def rounded_up(length: int) -> int:
    """The length for which programs are compiled: fewer than length / 4 more, or than SHORTEST where that is more."""
    step = max(SHORTEST, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


@dataclasses.dataclass
class _Collected:
    """What has been written so far.

    Attributes:
      stops: tokens that end a sequence.
      is_done: of each sequence; what follows them in the batch is padding.
    """

    stops: Int[np.ndarray, " stops"]
    on_tokens: OnTokens | None
    is_done: Bool[np.ndarray, " rows"]
    pieces: list[Int[np.ndarray, "rows tokens"]] = dataclasses.field(default_factory=list)

    def all_of(self, params: Any, writing: Writing, program: Program, max_new_tokens: int) -> list[Tokens]:
        """The new tokens of every sequence, up to max_new_tokens."""
        goes_on = self._add(np.asarray(writing.last)[:, None])
        left = max_new_tokens - 1
        stride = STRIDE if self.on_tokens is None else STRIDE_OF_A_LISTENER
        while goes_on and left:
            limit = np.int32(min(left, stride))
            writing, tokens, written = write(params, writing, self.stops, limit, program=program, most=STRIDE)
            columns = np.asarray(tokens)[:, : int(written)]
            left -= columns.shape[1]
            goes_on = self._add(columns)
        every = np.concatenate(self.pieces, axis=1)
        return [self._until_end(row) for row in every]

    def _add(self, columns: Int[np.ndarray, "batch tokens"]) -> bool:
        """Keep the newest tokens, and hand them on; returns whether there is more to write."""
        columns = columns[: len(self.is_done)]
        self.pieces.append(columns)
        is_wanted = True
        if self.on_tokens is not None:
            new = [row[:0] if done else self._until_end(row) for row, done in zip(columns, self.is_done, strict=True)]
            is_wanted = not self.on_tokens(new)
        self.is_done |= np.isin(columns, self.stops).any(1)
        return is_wanted and not self.is_done.all()

    def _until_end(self, row: Tokens) -> Tokens:
        """The tokens up to the first that ends a sequence."""
        places = np.flatnonzero(np.isin(row, self.stops))
        return row[: places[0] + 1] if len(places) else row


@contextlib.contextmanager
def _mesh_of(params: Any) -> Iterator[LogicalRules]:
    """Compute on the mesh on which the parameters lie, if any; yields the rules by which it splits arrays."""
    in_force = not jax.sharding.get_abstract_mesh().empty
    shardings = (leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    mesh = next((each.mesh for each in shardings if isinstance(each, NamedSharding)), None)
    if in_force or not isinstance(mesh, Mesh) or not set(MESH_AXES) <= set(mesh.axis_names):
        yield _rules_in_force()
        return
    with use_mesh(mesh):
        yield _rules_in_force()


def _rules_in_force() -> LogicalRules:
    # One new token cannot be split, and of a prompt each device then has all keys and values that its rows need.
    rules: Any = nn.get_logical_axis_rules()
    return tuple((name, _as_tuple(axes)) for name, axes in rules if name != "seq")


def _as_tuple(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _batch_size(rows: int, rules: LogicalRules) -> int:
    """The number of rows with those that are added so that the mesh can split them."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(rules).get("batch", ())
    parts = 1 if mesh.empty else parts_of(axes, mesh)
    return -(-rows // parts) * parts


def _seeds(seeds: int | Sequence[int], rows: int, batch: int) -> Int[np.ndarray, " batch"]:
    """A seed for each row of the batch."""
    own = range(seeds, seeds + rows) if isinstance(seeds, int) else list(seeds)
    if len(own) != rows:
        raise UserError(f"seeds: {len(own)} of them for {rows} prompts; give one for each, or one for all")
    for seed in own:
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seeds: {seed} must be between 0 and {LARGEST_SEED:,}")
    return np.array([*own, *[0] * (batch - rows)], np.uint32)


def _check(config: ModelConfig, rows: list[np.ndarray], max_new_tokens: int, stop_ids: Sequence[int]) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not rows:
        raise UserError("prompts: there are none; give at least one")
    for number, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            right = "must be a list of at least one token; a document begins with the separator"
            raise UserError(f"prompts[{number}]: {right}")
        _check_tokens(f"prompts[{number}]", row, config)
    _check_tokens("stop_ids", np.asarray(stop_ids, np.int64), config)
    longest = max(len(row) for row in rows)
    # The last token that is written is not read.
    if config.max_positions is not None and longest + max_new_tokens - 1 > config.max_positions:
        limit = f"model.max_positions={config.max_positions}"
        if longest > config.max_positions:
            raise UserError(f"a prompt of {longest:,} tokens: longer than {limit}; shorten it")
        most = config.max_positions - longest + 1
        raise UserError(f"max_new_tokens={max_new_tokens}: after a prompt of {longest:,} at most {most:,} fit {limit}")


def _check_tokens(name: str, tokens: np.ndarray, config: ModelConfig) -> None:
    unknown = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(unknown):
        raise UserError(f"{name}: token {unknown[0]} is not in the vocabulary of {config.vocab_size:,}")
