"""The table of optimizers, and the optimizer of a run, made from its configuration."""

from collections.abc import Callable
from typing import NamedTuple

import optax
from jax.sharding import Mesh

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.mesh.sharding_rules import RULES, Rules
from hybridnorm_jax.training.optimizers.adafactor import scale_by_adafactor
from hybridnorm_jax.training.optimizers.decay import decayed
from hybridnorm_jax.training.optimizers.moments import in_bfloat16
from hybridnorm_jax.training.optimizers.muon import muon_or
from hybridnorm_jax.training.optimizers.rates import rated, schedule_of
from hybridnorm_jax.training.optimizers.schedule_free import schedule_free
from hybridnorm_jax.training.optimizers.schedules import StepNumbers
from hybridnorm_jax.training.optimizers.widths import by_width
from hybridnorm_jax.training.unit_matrices import keep_unit_matrices


class Places(NamedTuple):
    """Where parameters lie: `rules` on `mesh`; without a mesh on one device."""

    mesh: Mesh | None = None
    rules: Rules = RULES


def _adam(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _adafactor(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    return scale_by_adafactor(config)


def _lion(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)


def _muon(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    return muon_or(_adam(config, places), config, places.mesh, places.rules)


def _root_mean_square(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    return optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)


# optimizer.name -> what makes gradients a direction.
DIRECTIONS: dict[str, Callable[[OptimizerSection, Places], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "schedule_free": _root_mean_square,
}


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
    direction = DIRECTIONS[config.name](config, places or Places())
    if config.moment_dtype == "bfloat16":
        direction = in_bfloat16(direction, numbers)
    direction = by_width(direction, width_ratio)
    decay, rate = decayed(config, numbers), rated(config, numbers)
    if unit_matrices:
        return optax.chain(*clip, direction, rate, keep_unit_matrices())
    if config.name == "schedule_free":
        steps = optax.chain(direction, decay, rate)
        return optax.chain(*clip, schedule_free(config, steps, schedule_of(config, numbers)))
    return optax.chain(*clip, direction, decay, rate)
