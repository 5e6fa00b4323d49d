"""Claims about the time of a step, taken in turns on this machine."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.equivalence.forms import FORMS, conversion_of
from hybridnorm_jax.lab.claims.claim import Finding
from hybridnorm_jax.lab.claims.forms import drawn, random_tokens
from hybridnorm_jax.lab.claims.training import batches, program_of
from hybridnorm_jax.lab.compare_options import DEFAULT
from hybridnorm_jax.lab.turns import measure
from hybridnorm_jax.model.decoder import Decoder

ROUNDS = 60
SIZE = (
    "model.d_model=256",
    "model.num_layers=4",
    "model.mlp_dim=768",
    "model.scan_unroll=4",
    "train.batch_size=2",
    "train.seq_len=256",
    "train.steps=1",
    "train.watch_every=null",
    "optimizer.warmup_steps=0",
)
PRE_LN = (
    *SIZE,
    "model.scheme=pre",
    "model.norm=layernorm",
    "model.norm_bias=true",
    "model.attention_bias=true",
    "model.mlp_bias=true",
)
# As fast as another is what takes at most so many times its time.
AS_FAST = 1.05
Step = Callable[[], Array]
Ratios = Mapping[str, Float[np.ndarray, "rounds"]]


class Interval(NamedTuple):
    """Where a number lies with a confidence of 95 %."""

    lower: float
    upper: float


def training_faster(form: str, *, rounds: int = ROUNDS, arguments: tuple[str, ...] = ()) -> Finding:
    """Whether a training step of the form, conversion and pull-back included, takes less time than Pre-LN's."""
    return told(f"{form} / Pre-LN", training_ratios(rounds, arguments)[form], limit=1.0)


def forward_faster(form: str, *, rounds: int = ROUNDS, arguments: tuple[str, ...] = ()) -> Finding:
    """Whether a forward pass of one sequence takes less time in the form, converted beforehand, than Pre-LN's."""
    return told(f"{form} / Pre-LN", forward_ratios(rounds, arguments)[form], limit=1.0)


def as_fast(*, scheme: str, baseline: str, rounds: int = ROUNDS, arguments: tuple[str, ...] = ()) -> Finding:
    """Whether a training step of a scheme takes at most AS_FAST times the baseline's."""
    configs = {name: parse([*SIZE, f"model.scheme={name}", *arguments], DEFAULT) for name in (baseline, scheme)}
    ratios = in_turns({name: training_step(config) for name, config in configs.items()}, baseline, rounds)
    return told(f"{scheme} / {baseline}", ratios[scheme], limit=AS_FAST)


def told(what: str, ratios: Float[np.ndarray, "rounds"], *, limit: float) -> Finding:
    """A time as a multiple of another's: below the limit, or above, if the interval of its median says so.

    Args:
      what: whose times these are, in words.
      ratios: one for each round.
    """
    interval = median_interval(ratios)
    number = f"time of {what}: median {np.median(ratios):.3f} ({interval.lower:.3f} to {interval.upper:.3f})"
    if interval.lower <= limit <= interval.upper:
        return Finding(number=number, holds=None, reason=f"{limit:g} lies within the 95 % interval of the median")
    return Finding(number=number, holds=interval.upper < limit)


def median_interval(values: Float[np.ndarray, "rounds"]) -> Interval:
    """The narrowest pair of order statistics that contains the median with at least 95 %, whatever the distribution.

    At least k of n values lie below the median with the probability that n fair coins show k heads or more. Fewer than
    six values have no such pair; theirs is least and greatest.
    """
    ordered, count = np.sort(values), len(values)
    outside, rank = 1 / 2**count, 0
    while outside + math.comb(count, rank + 1) / 2**count <= 0.025:
        rank += 1
        outside += math.comb(count, rank) / 2**count
    return Interval(lower=float(ordered[rank]), upper=float(ordered[count - 1 - rank]))


@functools.cache
def training_ratios(rounds: int, arguments: tuple[str, ...] = ()) -> Ratios:
    """Time of a training step of each form over Pre-LN's."""
    config = parse([*PRE_LN, *arguments], DEFAULT)
    steps = {}
    for form in ("none", *FORMS):
        section = dataclasses.replace(config.train, equivalent_form=form)
        steps[form] = training_step(dataclasses.replace(config, train=section))
    return in_turns(steps, "none", rounds)


@functools.cache
def forward_ratios(rounds: int, arguments: tuple[str, ...] = ()) -> Ratios:
    """Time of a forward pass of each form, batch 1, over Pre-LN's."""
    config = parse([*PRE_LN, *arguments], DEFAULT)
    tokens, params = random_tokens(config.model, config.train.seq_len)[:1], drawn(config.model)
    steps = {"none": functools.partial(jax.jit(Decoder(config.model).apply), {"params": params}, tokens)}
    for form in FORMS:
        conversion = conversion_of(config.model, form)
        variables = {"params": jax.jit(conversion.convert)(params)}
        steps[form] = functools.partial(jax.jit(Decoder(conversion.config).apply), variables, tokens)
    return in_turns(steps, "none", rounds)


def training_step(config: RunConfig) -> Step:
    """A function that makes the next training step of the configuration's model and returns the loss."""
    program = program_of(config)
    (batch,) = batches(config)
    state = program.fresh_state()

    def step() -> Array:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        return metrics["loss"]

    return step


def in_turns(steps: Mapping[str, Step], baseline: str, rounds: int) -> Ratios:
    """Seconds of each step over the baseline's of the same round."""
    seconds = measure(steps, rounds)
    return {name: values / seconds[baseline] for name, values in seconds.items()}
