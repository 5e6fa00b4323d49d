"""What makes gradients a direction: a function for each row of the table of optimizers (config/optimizer_kinds.py)."""

from typing import NamedTuple

import optax
from jax.sharding import Mesh

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.mesh.sharding_rules import RULES, Rules
from hybridnorm_jax.training.optimizers.adafactor import scale_by_adafactor
from hybridnorm_jax.training.optimizers.muon import muon_or


class Places(NamedTuple):
    """Where parameters lie: `rules` on `mesh`; without a mesh on one device."""

    mesh: Mesh | None = None
    rules: Rules = RULES


def adam(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    """The direction of Adam."""
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def adafactor(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    """The direction of Adafactor."""
    return scale_by_adafactor(config)


def lion(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    """The direction of Lion."""
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)


def muon(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    """The direction of Muon for matrices, and that of Adam for everything else."""
    return muon_or(adam(config, places), config, places.mesh, places.rules)


def root_mean_square(config: OptimizerSection, places: Places) -> optax.GradientTransformation:
    """Gradients divided by the root of the mean of their squares: Adam's direction without a mean of gradients."""
    return optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
