"""The table of optimizers, and the optimizer of a run, made from its configuration."""

import optax

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.training.optimizers.decay import decayed
from hybridnorm_jax.training.optimizers.rates import rated
from hybridnorm_jax.training.optimizers.schedules import StepNumbers
from hybridnorm_jax.training.unit_matrices import keep_unit_matrices


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
    decay, rate = decayed(config, numbers), rated(config, numbers)
    if unit_matrices:
        return optax.chain(*clip, adam, rate, keep_unit_matrices())
    return optax.chain(*clip, adam, decay, rate)
