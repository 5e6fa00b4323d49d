"""Patterns of paths give groups of parameters a learning rate and a weight decay of their own."""

import dataclasses

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.training.optimizers.chain import make_optimizer
from hybridnorm_jax.training.optimizers.groups import path_text
from hybridnorm_jax.training.optimizers.schedules import step_numbers
from hybridnorm_jax.training.program import Program, compiled_values

SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 16, "vocab_size": 31, "scheme": "pre"}
RATES = {"*/kernel": 0.5, "*/query/kernel": 0.25, "head/*": 2.0}
DECAYS = {"*/key/kernel": 0.0, "token_embedding/*": 0.5}


@pytest.fixture(scope="module")
def params():
    return jax.jit(hn.Decoder(hn.ModelConfig(**SIZES)).init)(jax.random.key(0), np.zeros((1, 2), int))["params"]


def _updates(params, gradient, **section):
    config = OptimizerSection(schedule="constant", learning_rate=0.1, clip=None, **section)
    optimizer = make_optimizer(config, step_numbers(config, steps=1, tokens_per_step=1, seed=0))
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradient, params)
    return {path_text(path): leaf for path, leaf in jax.tree.leaves_with_path(updates)}


def test_the_last_pattern_that_fits_scales_the_update_with_its_decay(params):
    gradient = jax.tree.map(lambda leaf: leaf + 1, params)
    plain, grouped = _updates(params, gradient), _updates(params, gradient, rate_factors=RATES)
    for path, update in plain.items():
        factor = 2 if path == "head/kernel" else 0.25 if "query" in path else 0.5 if path.endswith("kernel") else 1
        # Powers of two round nothing, but XLA may fuse product and sum: two last bits of float32.
        np.testing.assert_allclose(grouped[path], factor * update, rtol=2.4e-7, err_msg=path)


def test_own_weight_decays_replace_the_general_rule(params):
    """A gradient of zero leaves the decay alone: rate 0.1 times weight decay times parameter."""
    zero = jax.tree.map(np.zeros_like, params)
    updates = _updates(params, zero, weight_decays=DECAYS, weight_decay=0.25)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_text(path)
        decay = 0.0 if "key/kernel" in name else 0.5 if "embedding" in name else 0.25
        np.testing.assert_allclose(updates[name], -0.1 * decay * leaf, rtol=1e-6, err_msg=name)


def test_the_state_is_that_of_a_run_without_groups(params):
    """So a branch of a run may have other groups, and a run without any keeps its checkpoints' layout."""

    def layout(**section):
        config = OptimizerSection(**section)
        optimizer = make_optimizer(config, step_numbers(config, steps=1, tokens_per_step=1, seed=0))
        return jax.tree.structure(optimizer.init(params))

    assert layout() == layout(rate_factors=RATES, weight_decays=DECAYS)


@pytest.mark.parametrize(
    ("key", "pattern", "message"),
    [
        ("rate_factors", "*/querry/kernel", "fits no parameter; did you mean '*/query/kernel'?"),
        ("weight_decays", "run_7/attention/query/kernel", "fits no parameter; did you mean '*/query/kernel'?"),
        ("rate_factors", "heads/kernel", "fits no parameter; did you mean 'head/kernel'?"),
        ("rate_factors", "heed/*", "fits no parameter; did you mean 'head/*'?"),
        ("rate_factors", "x", "fits no parameter; known: */attention_pre_norm/scale, */down/kernel, */feed"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_before_anything_is_compiled(key, pattern, message):
    section = OptimizerSection(**{key: {"*/down/kernel": 1.0, pattern: 0.5}})
    config = RunConfig(model=hn.ModelConfig(**SIZES), optimizer=section)
    with pytest.raises(ConfigError) as caught:
        Program(config)
    assert str(caught.value).startswith(f"optimizer.{key}: the pattern {pattern!r} {message}")


def test_numbers_of_groups_are_arguments_of_the_step_and_patterns_are_compiled():
    def run(**section):
        return compiled_values(dataclasses.replace(RunConfig(), optimizer=OptimizerSection(**section)))

    assert run(rate_factors={"a": 1.0}, weight_decays={"b": 0.0}) == run(
        rate_factors={"a": 2.0}, weight_decays={"b": 0.5}
    )
    assert run(rate_factors={"a": 1.0}) != run(rate_factors={"b": 1.0})
    assert run(rate_factors={"a": 1.0, "b": 1.0}) != run(rate_factors={"b": 1.0, "a": 1.0})


def test_groups_are_set_as_maps_or_by_entry():
    words = ["optimizer.rate_factors={'*/router/kernel': 0.1}", "optimizer.rate_factors.head/kernel=2"]
    assert parse(words).optimizer.rate_factors == {"*/router/kernel": 0.1, "head/kernel": 2.0}
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decays=.*ngpt keeps its matrices at unit length"):
        parse(["model.scheme=ngpt", "optimizer.weight_decays={head/*: 0.1}"])
