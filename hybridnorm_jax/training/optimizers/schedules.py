"""Learning-rate schedules, computed from numbers that the compiled step takes as arguments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config.resume_keys import warmup_steps, wsd_decay_steps
from hybridnorm_jax.config_fields import present


class Pieces(NamedTuple):
    """Rates that change at once.

    Attributes:
      steps: rising numbers of updates.
      factors: the rate after so many updates, as a multiple of the largest; before the first it is 1.
    """

    steps: tuple[int, ...]
    factors: tuple[float, ...]


class StepNumbers(NamedTuple):
    """What the compiled training step takes as arguments: runs that differ in nothing else share one program.

    Attributes:
      peak: the largest learning rate.
      final: the last one, where the schedule falls.
      warmup: updates of linear warm-up.
      fall_begin: the update after which the rate falls.
      fall_length: the number of updates in which it falls to `final`.
      weight_decay: decoupled, times the learning rate.
      dropout_seed: the numbers of a jax.random key (random.key_data), from which dropout is drawn.
      pieces: of the schedule `piecewise`; None: of another schedule.
      rate_factors, weight_decays: of the groups of parameters that have their own, in the order of their patterns.
      muon_rate_factor: of the matrices that Muon updates.
    """

    peak: float
    final: float
    warmup: int
    fall_begin: int
    fall_length: int
    weight_decay: float
    dropout_seed: UInt32[np.ndarray, "words"]
    pieces: Pieces | None = None
    rate_factors: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    muon_rate_factor: float = 1.0


def step_numbers(config: OptimizerSection, *, steps: int, tokens_per_step: int, seed: int) -> StepNumbers:
    """The numbers of a run.

    Args:
      steps: optimizer updates in all.
      seed: train.seed.
    """
    warmup = warmup_steps(config, tokens_per_step)
    after = max(1, steps - warmup)
    length = wsd_decay_steps(config, steps, warmup) if config.schedule == "wsd" else after
    return StepNumbers(
        peak=config.learning_rate,
        final=config.learning_rate * config.final_ratio,
        warmup=warmup,
        fall_begin=warmup + after - length,
        fall_length=length,
        weight_decay=config.weight_decay,
        dropout_seed=np.asarray(jax.random.key_data(jax.random.key(seed))),
        pieces=_pieces(config),
        rate_factors=tuple(config.rate_factors.values()),
        weight_decays=tuple(config.weight_decays.values()),
        muon_rate_factor=config.muon_rate_factor,
    )


def _pieces(config: OptimizerSection) -> Pieces | None:
    if config.schedule != "piecewise":
        return None
    steps, factors = zip(*config.pieces, strict=True)
    return Pieces(steps, factors)


def learning_rate(
    schedule: str, numbers: StepNumbers, count: Int[ArrayLike, ""], *, wsd_decay: str = "linear"
) -> Float[Array, ""]:
    """Learning rate of optimizer update number `count` = 0, 1, ..., steps - 1, in float32.

    Linear warm-up to the peak, reached by update `warmup`, then
      cosine        half a cosine down to final_ratio * peak, reached by the last update
      linear        a straight line there
      wsd           the peak, and in the last wsd_decay_fraction of all updates down there in the form `wsd_decay`
      inverse_sqrt  peak * sqrt(warmup / number of the update), counted from 1; without a warm-up as with one of 1
      piecewise     the peak times the factor of the last of numbers.pieces whose steps have been made
      constant      the peak
    The first update already has peak / warmup: a rate of zero would waste it.

    Optax's schedules compute the same, but take their numbers from Python, which would compile them into the program.

    Args:
      wsd_decay: linear, cosine, 1-sqrt (2405.18392) or exponential; with x from 0 to 1 in the decay, the last is
        peak * final_ratio^x, and the others lie by 1 - x, (1 + cos(pi x)) / 2 and 1 - sqrt(x) between end and peak.
    """
    made = count + 1
    rate = _after_warmup(schedule, numbers, made, wsd_decay)
    return jnp.where(made < numbers.warmup, numbers.peak * made / jnp.maximum(numbers.warmup, 1), rate)


def _after_warmup(schedule: str, numbers: StepNumbers, made: Int[ArrayLike, ""], wsd_decay: str) -> Float[Array, ""]:
    """The rate of the update with number `made`, as if there were no warm-up."""
    if schedule == "inverse_sqrt":
        begin = jnp.maximum(numbers.warmup, 1)
        return numbers.peak * jnp.sqrt(begin / jnp.maximum(made, begin))
    if schedule == "piecewise":
        return numbers.peak * _factor(present(numbers.pieces), made - 1)
    fallen = jnp.clip(made - numbers.fall_begin, 0, numbers.fall_length) / numbers.fall_length
    match wsd_decay if schedule == "wsd" else schedule:
        case "cosine":
            share = 0.5 * (1 + jnp.cos(jnp.pi * fallen))
        case "linear":
            share = 1 - fallen
        case "1-sqrt":
            share = 1 - jnp.sqrt(fallen)
        case "exponential":
            return numbers.peak * (numbers.final / numbers.peak) ** fallen
        case "constant":
            share = jnp.ones_like(fallen)
    return numbers.final + (numbers.peak - numbers.final) * share


def _factor(pieces: Pieces, before: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """Of the last piece that begins after at most so many updates."""
    factor = jnp.ones(())
    for steps, later in zip(pieces.steps, pieces.factors, strict=True):
        factor = jnp.where(before >= steps, later, factor)
    return factor
