"""Schedule-free AdamW (Defazio et al., 2405.15682): steps are averaged, and the rate does not fall."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Int

from hybridnorm_jax.config.optimizer_section import OptimizerSection

# Steps are averaged by the square of the largest rate so far, so that those of the warm-up count little.
_POWER = 2.0


def schedule_free(
    config: OptimizerSection, base: optax.GradientTransformation, rate: Callable[[Int[Array, ""]], Array]
) -> optax.GradientTransformation:
    """Steps z_t of `base`, their weighted average x_t, and the parameters y_t = b1 x_t + (1 - b1) z_t of the gradient.

    The training state's parameters are y; z is a part of this state, and averaged_params gives x.

    Args:
      base: updates without a mean of gradients, whose place b1 takes here.
      rate: learning rate of update 0, 1, ..., as `base` has it.
    """
    # Optax counts from 1 here. Its count stands still in a skipped step, unlike that of the rate: during the warm-up a
    # step after one is weighed as the step before it would have been.
    return optax.contrib.schedule_free(base, lambda count: rate(count - 1), b1=config.b1, weight_lr_power=_POWER)


def averaged_params(opt_state: Any, params: Any) -> Any:
    """x, the parameters that are to be evaluated, of an optimizer state with that of schedule_free in it."""
    states = jax.tree.leaves(opt_state, is_leaf=_is_schedule_free)
    (state,) = filter(_is_schedule_free, states)
    return optax.contrib.schedule_free_eval_params(state, params)


def _is_schedule_free(state: Any) -> bool:
    return isinstance(state, optax.contrib.ScheduleFreeState)
