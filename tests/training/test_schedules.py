"""Learning-rate schedules are their formulas, and runs whose rates differ share compiled steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.optimizer_section import FALLS, SCHEDULES, OptimizerSection
from hybridnorm_jax.config.resume_keys import last_step_at_any_length, resume_differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training.optimizers.schedules import learning_rate, step_numbers
from hybridnorm_jax.training.program import compiled_values

STEPS, WARMUP, DECAY = 20, 4, 5  # 0.25 of the steps


def _rates(steps=STEPS, **section):
    config = OptimizerSection(**{"learning_rate": 2.0, "warmup_steps": WARMUP} | section)
    numbers = step_numbers(config, steps=steps, tokens_per_step=1, seed=0)
    return np.asarray(learning_rate(config.schedule, numbers, jnp.arange(steps), wsd_decay=config.wsd_decay))


def _decayed(form, x):
    """The rate after the share x of a decay from 2 to 0.2, as the docstring has it."""
    if form == "exponential":
        return 2.0 * 0.1**x
    above = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "1-sqrt": 1 - math.sqrt(x)}[form]
    return 0.2 + 1.8 * above


@pytest.mark.parametrize("form", FALLS)
def test_wsd_falls_in_each_form(form):
    rates = _rates(schedule="wsd", wsd_decay_fraction=DECAY / STEPS, wsd_decay=form)
    np.testing.assert_allclose(rates[:WARMUP], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[WARMUP : STEPS - DECAY], 2.0, rtol=1e-6)
    # Float32: the cosine of pi and the root of 1 are exact, a power is within a few last bits of 1.2e-7.
    expected = [_decayed(form, x / DECAY) for x in range(1, DECAY + 1)]
    np.testing.assert_allclose(rates[-DECAY:], expected, rtol=1e-6)
    assert rates[-1] == pytest.approx(0.2, rel=1e-6)


def test_inverse_square_root_begins_at_the_end_of_the_warm_up():
    rates = _rates(schedule="inverse_sqrt")
    np.testing.assert_allclose(rates[[3, 15]], [2.0, 2.0 * math.sqrt(4 / 16)], rtol=1e-6)
    np.testing.assert_allclose(_rates(schedule="inverse_sqrt", warmup_steps=0)[[0, 15]], [2.0, 0.5], rtol=1e-6)


def test_pieces_count_the_steps_before():
    rates = _rates(schedule="piecewise", piecewise={"15": 0.1, "10": 0.5}, warmup_steps=2)
    expected = [1.0, *[2.0] * 9, *[1.0] * 5, *[0.2] * 5]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FALLS)
def test_rates_up_to_the_last_step_at_any_length_are_those_of_a_longer_run(schedule, form):
    """And the next one is another, where there is a last."""
    pieces = {"12": 0.5} if schedule == "piecewise" else {}
    section = {"schedule": schedule, "wsd_decay": form, "piecewise": pieces, "wsd_decay_fraction": 0.25}
    short, long = _rates(**section), _rates(steps=40, **section)
    last = last_step_at_any_length(OptimizerSection(warmup_steps=WARMUP, **section), STEPS, 1)
    same = min(STEPS, last)
    np.testing.assert_array_equal(short[:same], long[:same])
    assert last == math.inf or short[same] != long[same]


def test_runs_without_an_end_can_be_trained_longer():
    def run(steps, **section):
        return RunConfig(
            train=dataclasses.replace(RunConfig().train, steps=steps), optimizer=OptimizerSection(**section)
        )

    for section in ({"schedule": "inverse_sqrt"}, {"schedule": "piecewise", "piecewise": {"3": 0.5}}):
        assert resume_differences(run(10, **section), run(20, **section), 10) == []
    (line,) = resume_differences(run(10), run(20), 5)
    assert "only the schedules inverse_sqrt, piecewise and constant, and wsd before its decay" in line


def test_the_numbers_of_pieces_are_no_part_of_the_program():
    def run(**pieces):
        return RunConfig(optimizer=OptimizerSection(schedule="piecewise", piecewise=pieces))

    assert compiled_values(run(**{"3": 0.5})) == compiled_values(run(**{"4": 0.1}))
    assert compiled_values(run(**{"3": 0.5})) != compiled_values(run(**{"3": 0.5, "4": 0.1}))
    traced = jax.jit(lambda numbers: learning_rate("piecewise", numbers, 4))
    for pieces, expected in (({"3": 0.5}, 0.5), ({"5": 0.1}, 1.0)):
        config = OptimizerSection(learning_rate=1.0, schedule="piecewise", piecewise=pieces)
        numbers = step_numbers(config, steps=9, tokens_per_step=1, seed=0)
        assert traced(numbers._replace(dropout_seed=0)) == np.float32(expected)
    assert traced._cache_size() == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.schedule=inverse_root", "optimizer.schedule=inverse_root: not known; did you mean 'inverse_sqrt'?"),
        ("optimizer.schedule=piecewise", "needs steps, such as {3000: 0.3, 4000: 0.1}"),
        ("optimizer.piecewise={3: 0.1}", "needs optimizer.schedule=piecewise"),
        ("optimizer.piecewise={3: -1}", "must be at least 0"),
        ("optimizer.piecewise={3: high}", "expected a map of numbers, such as {name: 0.5}"),
        ("optimizer.piecewise={-3: 1}", "optimizer.piecewise.-3=1.0: must be named by a number of steps"),
        ("optimizer.piecewise={1e3: 1}", "optimizer.piecewise.1e3=1.0: must be named by a number of steps"),
        ("optimizer.piecewise={99999999999: 1}", "from 0 to 1,000,000,000 and in digits"),
        ("optimizer.wsd_decay=sqrt", "optimizer.wsd_decay=sqrt: not known; did you mean '1-sqrt'?"),
        ("optimizer.wsd_decay=exponential", "optimizer.final_ratio=0.0: must be above 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(override, message):
    words = {"optimizer.wsd_decay=exponential": ["optimizer.schedule=wsd", "optimizer.final_ratio=0"]}
    if override.startswith("optimizer.piecewise={") and "needs optimizer" not in message:
        words[override] = ["optimizer.schedule=piecewise"]
    with pytest.raises(ConfigError) as caught:
        parse([override, *words.get(override, [])])
    assert message in str(caught.value)
