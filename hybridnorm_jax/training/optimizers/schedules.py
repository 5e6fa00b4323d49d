"""Learning-rate schedules, computed from numbers that the compiled step takes as arguments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config.resume_keys import warmup_steps, wsd_decay_steps


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
    """

    peak: float
    final: float
    warmup: int
    fall_begin: int
    fall_length: int
    weight_decay: float
    dropout_seed: UInt32[np.ndarray, "words"]


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
    )


def learning_rate(schedule: str, numbers: StepNumbers, count: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """Learning rate of optimizer update number `count` = 0, 1, ..., steps - 1, in float32.

    Linear warm-up to the peak, reached by update `warmup`, then
      cosine    half a cosine down to final_ratio * peak, reached by the last update
      linear    a straight line there
      wsd       the peak, and a straight line there in the last wsd_decay_fraction of all updates
      constant  the peak
    The first update already has peak / warmup: a rate of zero would waste it.

    Optax's schedules compute the same, but take their numbers from Python, which would compile them into the program.
    """
    made = count + 1
    fallen = jnp.clip(made - numbers.fall_begin, 0, numbers.fall_length) / numbers.fall_length
    match schedule:
        case "cosine":
            share = 0.5 * (1 + jnp.cos(jnp.pi * fallen))
        case "linear" | "wsd":
            share = 1 - fallen
        case "constant":
            share = jnp.ones_like(fallen)
    rate = numbers.final + (numbers.peak - numbers.final) * share
    return jnp.where(made < numbers.warmup, numbers.peak * made / jnp.maximum(numbers.warmup, 1), rate)
