"""The last step of every optimizer: a direction becomes an update by the learning rate of each parameter."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.training.optimizers.groups import check_patterns, own_number
from hybridnorm_jax.training.optimizers.muon import is_muon_matrix
from hybridnorm_jax.training.optimizers.schedules import StepNumbers, learning_rate


def schedule_of(config: OptimizerSection, numbers: StepNumbers) -> Callable[[Int[ArrayLike, ""]], Array]:
    """Number of an update, from 0 on -> its learning rate."""
    return partial(learning_rate, config.schedule, numbers, wsd_decay=config.wsd_decay)


def rated(config: OptimizerSection, numbers: StepNumbers) -> optax.GradientTransformation:
    """Multiplies every direction by -(learning rate) and by the factors of its parameter.

    The factors are those of optimizer.rate_factors and, of the matrices that Muon updates, optimizer.muon_rate_factor.
    """
    rate = optax.scale_by_learning_rate(schedule_of(config, numbers))
    patterns = config.rate_factors
    if not patterns and not config.kind.splits_matrices:
        return rate

    def init(params: Any) -> optax.OptState:
        check_patterns("optimizer.rate_factors", patterns, params)
        return rate.init(params)

    def update(directions: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        def scaled(path: tuple[Any, ...], direction: Any) -> Any:
            own = own_number(path, patterns, numbers.rate_factors)
            if config.kind.splits_matrices and is_muon_matrix(config, path, direction):
                direction = numbers.muon_rate_factor * direction
            return direction if own is None else own * direction

        return rate.update(jax.tree.map_with_path(scaled, directions), state, params)

    return optax.GradientTransformation(init, update)
