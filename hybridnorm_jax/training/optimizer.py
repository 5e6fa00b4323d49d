"""AdamW as the papers train with it, and its learning-rate schedules."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32

from hybridnorm_jax.config.resume_keys import warmup_steps, wsd_decay_steps
from hybridnorm_jax.config.run_config import OptimizerSection
from hybridnorm_jax.training.unit_matrices import keep_unit_matrices


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


def decay_mask(config: OptimizerSection, params: Any) -> Any:
    """Which parameters decay, by name. What no line names never does, so that a new learned number has to be entered.

        kernel                                          always
        embedding                                       decay_embeddings
        bias, sinks, the scale and matrices of a norm   decay_norms_and_biases

    Never: other learned scales (of a branch, a residual, heads, the embedding), because decay draws them to 0, where
    they switch off what they multiply; alpha, shift and other numbers and vectors of a norm, for the same reason; and
    the biases that balance experts, which no gradient holds against it.

    Args:
      params: of a model, nested dicts; in what its runs hold, the layers are the first axis.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        *modules, name = (part.key for part in path)
        if name == "kernel":
            return True
        if name == "embedding":
            return config.decay_embeddings
        of_norm = bool(modules) and (modules[-1] == "norm" or modules[-1].endswith("_norm"))
        is_stacked = bool(modules) and modules[0].startswith("run_")
        is_matrix = np.ndim(leaf) - is_stacked > 1
        in_group = name in ("bias", "sinks") or (of_norm and (name == "scale" or is_matrix))
        return in_group and config.decay_norms_and_biases

    return jax.tree.map_with_path(decays, params)


def make_optimizer(
    config: OptimizerSection, numbers: StepNumbers, *, unit_matrices: bool = False
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decoupled decay: p <- p - rate * (adam(g) + weight_decay * p).

    Args:
      numbers: of the run, which may be traced: rate and decay are theirs, everything else is the configuration's.
      unit_matrices: nothing decays, and after each update matrices are normalized as nGPT's are (unit_matrices.py).
    """
    clip = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    rate = optax.scale_by_learning_rate(partial(learning_rate, config.schedule, numbers))
    if unit_matrices:
        return optax.chain(*clip, adam, rate, keep_unit_matrices())
    decay = optax.add_decayed_weights(numbers.weight_decay, mask=lambda params: decay_mask(config, params))
    return optax.chain(*clip, adam, decay, rate)
