"""The sum of the microbatches' gradients is formed in float32, whatever the compute dtype is."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from test_step import _batch, _config, _one_device

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.training.optimizers.schedules import step_numbers
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.step import StepOptions, make_train_step

MICROBATCHES = 8


def _gradient_keeper():
    """An optimizer that moves nothing and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )


@pytest.mark.parametrize("form", ["none", pytest.param("pre_rmsnorm", marks=pytest.mark.long)])
def test_with_bfloat16_compute_the_accumulated_sum_is_float32(form, small_config):
    """The sum that the step forms against the float64 sum of what the same program gives for each microbatch alone.

    A microbatch whose targets have no weight adds zeros, so one program gives every summand, bit for bit. Eight numbers
    are added in float32 and the sum divided once: 8 roundings of 2^-24 of the largest partial sum. In bfloat16 the same
    sum is off by more than 100 times that. With an equivalent form the sum is pulled back once, which is linear and
    rounds as much again.
    """
    model = {"num_layers": 1, "dtype": "bfloat16", "scheme": "pre", "norm": "layernorm"}
    train = {"grad_accumulation": MICROBATCHES, "equivalent_form": form}
    program = Program(_config(small_config, model=model, train=train), _one_device())
    optimizer = _gradient_keeper()
    convert = None if program.conversion is None else program.conversion.convert
    step = jax.jit(
        make_train_step(
            program.model,
            lambda _: optimizer,
            StepOptions(optimizer=OptimizerSection(schedule="constant")),
            convert=convert,
        )
    )
    fresh = program.fresh_state()
    state = dataclasses.replace(fresh, opt_state=optimizer.init(fresh.params))
    numbers = step_numbers(program.config.optimizer, steps=1, tokens_per_step=1, seed=0)

    def gradient(kept):
        batch = _batch(MICROBATCHES)
        weights = np.ones_like(batch["weights"])
        weights[[number for number in range(MICROBATCHES) if number not in kept]] = 0
        after, _, _ = step(state, batch | {"weights": weights}, numbers)
        return jax.device_get(after.opt_state), weights.sum()

    whole, weight = gradient(range(MICROBATCHES))
    parts = [gradient([number]) for number in range(MICROBATCHES)]

    def compare(path, ours, *each):
        assert ours.dtype == np.float32
        name = jax.tree_util.keystr(path)
        summands = [np.asarray(leaf, np.float64) * of_part for leaf, (_, of_part) in zip(each, parts, strict=True)]
        expected = sum(summands) / weight
        largest = np.abs(np.cumsum(summands, axis=0)).max() / weight
        tolerance = (8 if form == "none" else 32) * 2**-24 * largest
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=name)
        if path[-1].key != "kernel":
            return
        narrow = np.zeros(ours.shape, ml_dtypes.bfloat16)
        for summand in summands:
            narrow = narrow + summand.astype(ml_dtypes.bfloat16)
        error = np.abs(narrow.astype(np.float64) / weight - expected).max()
        assert error > 100 * tolerance, name

    jax.tree.map_with_path(compare, whole, *[tree for tree, _ in parts])
