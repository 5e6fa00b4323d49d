"""The average of the parameters over the steps of a run; the exponential moving one of optimizer.ema_decay."""

import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config_fields import present
from hybridnorm_jax.training.optimizers.schedule_free import averaged_params


@flax.struct.dataclass
class Average:
    """A part of the training state: the average, and over how many sets of parameters it is taken.

    It is that of `with_parameters`, or that of optimizers/schedule_free.py.

    Attributes:
      count: steps that were made since the average began. Skipped steps do not count.
      params: the average, in the dtype of the parameters, which training keeps in 32 bits at least; before the first of
        these steps the parameters themselves.
    """

    count: Int[Array, ""]
    params: Any


def begun_average(params: Any) -> Average:
    """The average before the first step that counts.

    The arrays are copies: a training step takes the memory of parameters and average, so they may not share it.
    """
    return Average(count=jnp.zeros((), jnp.int32), params=jax.tree.map(jnp.copy, params))


def begun_like(places: Average, params: Any) -> Average:
    """`begun_average`, which lies where `places` does, whose leaves are arrays or jax.ShapeDtypeStructs."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, places)
    begun: Average = jax.jit(begun_average, out_shardings=shardings)(params)
    return begun


def next_average(config: OptimizerSection, average: Average | None, params: Any, opt_state: Any) -> Average | None:
    """The average after one more step, which led to these parameters and this optimizer state; None: there is none."""
    if average is None:
        return None
    if config.kind.averages_steps:
        return Average(average.count + 1, averaged_params(opt_state, params))
    return with_parameters(average, params, decay=present(config.ema_decay))


def with_parameters(average: Average, params: Any, *, decay: float) -> Average:
    """The average after one more step, which led to `params`.

    After t steps that led to p_1, ..., p_t it is

        a_t = (sum over i of decay^(t-i) p_i) / (sum over i of decay^(t-i)),

    the average that weighs a step `decay` times as much as the one after it. The weights add up to 1 from the first
    step on, where a_1 = p_1: parameters that were only drawn are no part of it, and no warm-up of the decay is needed.
    This is the bias correction of Adam (Kingma and Ba 2014, section 3) for an average that begins at zero, kept in the
    corrected form:

        a_t = (1 - w) a_(t-1) + w p_t,    w = (1 - decay) / (1 - decay^t).

    Args:
      decay: above 0 and below 1; about 1 / (1 - decay) of the newest steps are averaged.
    """
    count = average.count + 1

    def moved(old: Array, new: Array) -> Array:
        # Not w * new + (1 - w) * old, as optax.incremental_update has it: 1 - w is rounded to a multiple of 2^-24, and
        # with decay = 0.9999 the weights would add up to 1 only within 3e-4.
        return old + step_weight(count, decay=decay, dtype=old.dtype) * (new - old)

    return Average(count=count, params=jax.tree.map(moved, average.params, params))


def step_weight(count: Int[Array, ""], *, decay: float, dtype: Any = jnp.float32) -> Float[Array, ""]:
    """w of `with_parameters` for t = count.

    1 - decay^t by expm1: the difference itself would lose most digits where decay is near 1.
    """
    passed = -jnp.expm1(count.astype(dtype) * jnp.asarray(math.log(decay), dtype))
    return jnp.asarray(1 - decay, dtype) / passed
