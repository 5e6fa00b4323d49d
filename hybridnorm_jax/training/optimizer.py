"""AdamW as the papers train with it, and its learning-rate schedules."""

from typing import Any

import jax
import numpy as np
import optax

from hybridnorm_jax.config.resume_keys import warmup_steps, wsd_decay_steps
from hybridnorm_jax.config.run_config import OptimizerSection
from hybridnorm_jax.training.unit_matrices import keep_unit_matrices


def learning_rate_schedule(config: OptimizerSection, steps: int, tokens_per_step: int) -> optax.Schedule:
    """Learning rate of optimizer update number `count` = 0, 1, ..., steps - 1.

    Linear warm-up to the peak, reached by update `warmup`, then
      cosine    half a cosine down to final_ratio * peak, reached by the last update
      linear    a straight line there
      wsd       the peak, and a straight line there in the last wsd_decay_fraction of all updates
      constant  the peak
    The first update already has peak / warmup: a rate of zero would waste it.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_ratio
    warmup = warmup_steps(config, tokens_per_step)
    after = max(1, steps - warmup)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, after, alpha=config.final_ratio)
        case "linear":
            decay = optax.linear_schedule(peak, final, after)
        case "wsd":
            length = wsd_decay_steps(config, steps, warmup)
            decay = optax.linear_schedule(peak, final, length, transition_begin=after - length)
        case "constant":
            decay = optax.constant_schedule(peak)
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay
    return lambda count: schedule(count + 1)


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
    config: OptimizerSection, schedule: optax.Schedule, *, unit_matrices: bool = False
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decoupled decay: p <- p - rate * (adam(g) + weight_decay * p).

    Args:
      unit_matrices: nothing decays, and after each update matrices are normalized as nGPT's are (unit_matrices.py).
    """
    clip = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if unit_matrices:
        return optax.chain(*clip, adam, optax.scale_by_learning_rate(schedule), keep_unit_matrices())
    return optax.chain(
        *clip,
        adam,
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(config, params)),
        optax.scale_by_learning_rate(schedule),
    )
