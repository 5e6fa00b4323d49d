"""The optimizer is AdamW as its formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridnorm_jax.config.run_config import OptimizerSection
from hybridnorm_jax.training.optimizers.chain import make_optimizer
from hybridnorm_jax.training.optimizers.schedules import step_numbers

STEPS = 5


def adamw(params, gradients, config):
    """AdamW on a dict of float64 arrays, written out: Decoupled Weight Decay (1711.05101), algorithm 2."""
    first = dict.fromkeys(params, 0.0)
    second = dict.fromkeys(params, 0.0)
    for step, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.square(g).sum() for g in gradient.values()))
        for name, g in gradient.items():
            clipped = g * min(1.0, config.clip / norm)
            first[name] = config.b1 * first[name] + (1 - config.b1) * clipped
            second[name] = config.b2 * second[name] + (1 - config.b2) * clipped**2
            direction = first[name] / (1 - config.b1**step)
            direction = direction / (np.sqrt(second[name] / (1 - config.b2**step)) + config.eps)
            decayed = config.weight_decay * params[name] if name == "kernel" else 0.0
            params = params | {name: params[name] - config.learning_rate * (direction + decayed)}
    return params


@pytest.mark.parametrize("clip", [1e3, 0.5])
def test_steps_are_those_of_adamw_in_float64(clip):
    config = OptimizerSection(
        schedule="constant", learning_rate=0.1, b1=0.7, b2=0.9, eps=1e-3, clip=clip, decay_norms_and_biases=False
    )
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((3, 2)), "scale": rng.standard_normal(4)}
    gradients = [{name: rng.standard_normal(array.shape) for name, array in params.items()} for _ in range(STEPS)]
    with jax.enable_x64(True):
        optimizer = make_optimizer(config, step_numbers(config, steps=STEPS, tokens_per_step=1, seed=0))
        ours = jax.tree.map(jnp.asarray, params)
        state = optimizer.init(ours)
        for gradient in gradients:
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, ours)
            ours = optax.apply_updates(ours, updates)
    for name, expected in adamw(params, gradients, config).items():
        # The constant schedule is a float32 number: a rate of 0.1 is 1.5e-8 off.
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6)
