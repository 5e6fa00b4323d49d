"""What XLA is told about the step: by platform, the user's flags first, and a refusal is one line."""

import jax
import jaxlib
import numpy as np
import pytest

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.training.memory import compile_within_memory
from hybridnorm_jax.training.state import init_params
from hybridnorm_jax.training.xla_options import described, initial_state_options, readable_refusals, step_options

HIDES, WIDTH = "xla_gpu_enable_latency_hiding_scheduler", "xla_cpu_prefer_vector_width"


@pytest.mark.parametrize(("platform", "expected"), [("gpu", {HIDES: True}), ("tpu", {})])
def test_options_of_gpus_and_tpus(monkeypatch, platform, expected):
    monkeypatch.setenv("XLA_FLAGS", "--xla_something_else=3")
    assert step_options(platform) == expected


@pytest.mark.skipif(not jaxlib.__version__.startswith("0.10."), reason="the options were tried with this XLA")
def test_cpus_have_options_that_their_compiler_takes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{WIDTH}=256")
    assert WIDTH not in step_options("cpu")
    monkeypatch.delenv("XLA_FLAGS")
    options = step_options("cpu")
    assert options[WIDTH] == 512
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    product = jax.jit(lambda x: x @ x.T, compiler_options=options)
    np.testing.assert_allclose(product(x), x @ x.T, rtol=1e-5, atol=1e-5)


def test_what_the_user_sets_wins(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{HIDES}=false --xla_other=1")
    assert step_options("gpu") == {}
    assert described({}) == f"XLA_FLAGS=--{HIDES}=false --xla_other=1"


def test_the_start_of_a_run_names_them(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert described(step_options("gpu")) == f"{HIDES}=true"
    assert described({}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xla_no_such": True}, "xla_no_such: refused by the compiler of JAX .*: this XLA has no such option; set it"),
        ({"xla_allow_excess_precision": "perhaps"}, "xla_allow_excess_precision: refused .* not a valid bool value"),
    ],
)
def test_a_refused_option_is_one_line(options, message):
    step = jax.jit(lambda x: x + 1, compiler_options=options)
    with pytest.raises(UserError, match=message) as error, readable_refusals():
        step(1.0)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        compile_within_memory(step.lower(1.0))


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"), readable_refusals():
        raise jax.errors.JaxRuntimeError("something else")


@pytest.mark.skipif(not jaxlib.__version__.startswith("0.10."), reason="the options were tried with this XLA")
def test_the_initial_state_has_the_same_bits_with_and_without_its_options(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = initial_state_options("cpu")
    assert options
    assert initial_state_options("tpu") == initial_state_options("gpu") == {}
    config = ModelConfig(d_model=64, num_layers=2, num_heads=2, mlp_dim=96, vocab_size=50)
    plain, fast = (
        jax.jit(lambda key: init_params(config, key), compiler_options=chosen)(jax.random.key(3))
        for chosen in ({}, options)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, fast)
