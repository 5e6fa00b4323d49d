"""What hn.generate is asked for: its arguments, checked before anything is computed."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.generation.sampling import fault_of_seed
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.config_sizes import LONGEST_CONTEXT
from hybridnorm_jax.model.encoder_config import check_decoder

Tokens = Int[np.ndarray, " tokens"]


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of hn.generate of these names; `rows` are the prompts and `ends` the stop ids, as arrays."""

    rows: list[Tokens]
    ends: Tokens
    max_new_tokens: int
    seeds: int | list[int]


def checked_request(
    config: ModelConfig,
    prompts: Sequence[Sequence[int] | Tokens],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seeds: int | Sequence[int],
) -> Request:
    """The arguments of hn.generate, integers of any type made those of Python and NumPy.

    Raises:
      UserError: what is asked for cannot be; names the argument.
    """
    check_decoder(config, "config", "generate text")
    if config.grows:
        wrong = f"the branches of model.scheme={config.scheme} grow with the training step"
        raise UserError(f"config: {wrong}; say at which, with config.at_step(step)")
    rows = [_integers(f"prompts[{number}]", prompt) for number, prompt in enumerate(prompts)]
    ends = _integers("stop_ids", stop_ids)
    max_new_tokens = _integer("max_new_tokens", max_new_tokens)
    if not 1 <= max_new_tokens <= LONGEST_CONTEXT:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1 and at most {LONGEST_CONTEXT:,}")
    _check_prompts(config, rows, max_new_tokens)
    _check_tokens("stop_ids", ends, config)
    return Request(rows=rows, ends=ends.astype(np.int32), max_new_tokens=max_new_tokens, seeds=_seeds(seeds, len(rows)))


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


def _integers(name: str, values: Any) -> Tokens:
    """The ids of tokens, as they are given: a sequence, a set or an array."""
    try:
        array = np.asarray(sorted(values) if isinstance(values, set | frozenset) else values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: must be a list of whole numbers, the ids of tokens") from error
    if array.dtype.kind not in "iu" and array.size:
        raise UserError(f"{name}: must be whole numbers, the ids of tokens, not {array.dtype}")
    return array


def _check_prompts(config: ModelConfig, rows: list[Tokens], max_new_tokens: int) -> None:
    if not rows:
        raise UserError("prompts: there are none; give at least one")
    for number, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise UserError(f"prompts[{number}]: must be a list of at least one token; begin with the separator")
        _check_tokens(f"prompts[{number}]", row, config)
    longest = max(len(row) for row in rows)
    # The last new token is written, but not read.
    if config.max_positions is not None and longest + max_new_tokens - 1 > config.max_positions:
        right = f"model.max_positions={config.max_positions}; shorten the prompt or ask for fewer"
        raise UserError(f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit {right}")
    short = config.length_of_short_factors
    for row in rows if short is not None else []:
        if len(row) <= short < len(row) + max_new_tokens - 1:
            wrong = f"a prompt of {len(row)} tokens and max_new_tokens={max_new_tokens}: the text grows beyond {short}"
            right = "where longrope rotates all its tokens anew; ask for fewer, or give a longer prompt"
            raise UserError(f"{wrong} tokens (model.rope_original_length), {right}")


def _check_tokens(name: str, tokens: Tokens, config: ModelConfig) -> None:
    unknown = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(unknown):
        raise UserError(f"{name}: token {unknown[0]} is not in the vocabulary of {config.vocab_size:,}")
