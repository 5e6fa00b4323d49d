"""The optimizer of a run, made from its configuration: clipping, direction, weight decay and rate in a chain."""

import optax

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.training.optimizers import directions
from hybridnorm_jax.training.optimizers.decay import decayed
from hybridnorm_jax.training.optimizers.directions import Places
from hybridnorm_jax.training.optimizers.moments import in_bfloat16
from hybridnorm_jax.training.optimizers.rates import rated, schedule_of
from hybridnorm_jax.training.optimizers.schedule_free import schedule_free
from hybridnorm_jax.training.optimizers.schedules import StepNumbers
from hybridnorm_jax.training.optimizers.widths import by_width
from hybridnorm_jax.training.unit_matrices import keep_unit_matrices


def make_optimizer(
    config: OptimizerSection,
    numbers: StepNumbers,
    *,
    unit_matrices: bool = False,
    width_ratio: float = 1.0,
    places: Places | None = None,
) -> optax.GradientTransformation:
    """Clipping by global norm, a direction d, decoupled weight decay and the rate: p <- p - rate (d + weight_decay p).

    Args:
      numbers: of the run, which may be traced: rate and decay are theirs, everything else is the configuration's.
      width_ratio: rates follow the width, see widths.by_width.
      unit_matrices: nothing decays, and after each update matrices are normalized as nGPT's are (unit_matrices.py).
      places: of the parameters; None: all on one device.
    """
    clip = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    direction = getattr(directions, config.kind.direction)(config, places or Places())
    if config.moment_dtype == "bfloat16":
        direction = in_bfloat16(direction, numbers)
    direction = by_width(direction, width_ratio)
    decay, rate = decayed(config, numbers), rated(config, numbers)
    if unit_matrices:
        return optax.chain(*clip, direction, rate, keep_unit_matrices())
    if config.kind.averages_steps:
        steps = optax.chain(direction, decay, rate)
        return optax.chain(*clip, schedule_free(config, steps, schedule_of(config, numbers)))
    return optax.chain(*clip, direction, decay, rate)
