"""Operations are counted exactly: products, loops, branches, reductions."""

import jax
import jax.numpy as jnp
import pytest

from hybridnorm_jax.config.run_config import OptimizerSection, RunConfig, TrainSection
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.training.arithmetic import operations
from hybridnorm_jax.training.program import Program

MATRIX = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def _count(function, *shapes):
    return operations(jax.make_jaxpr(function)(*shapes).jaxpr)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x @ x.T, 2 * 3 * 3 * 4),
        (lambda x: jnp.einsum("bi,bj->bij", x, x), 2 * 3 * 4 * 4),
        (lambda x: x + 1, 12),
        (lambda x: jnp.exp(x).reshape(12).T, 12),
        (lambda x: x.sum(), 12),
        (lambda x: jnp.max(x, axis=0), 12),
        (lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y * y, x), 5 * (12 + 1)),  # and the counter
        (lambda x: jax.lax.scan(lambda c, row: (c + row @ row, None), 0.0, x)[0], 3 * (2 * 4 + 1)),
        (lambda x: jax.lax.cond(True, lambda y: y * y + y, lambda y: y, x), 24),
        (lambda x: jnp.zeros(7).at[jnp.array([1, 1])].add(x[0, :2]), None),
        (jax.jit(lambda x: jax.checkpoint(jnp.sin)(x)), 12),
    ],
)
def test_counts(function, expected):
    if expected is None:  # the sums that are scattered, and the arithmetic of indices
        assert 2 <= _count(function, MATRIX) < 12
    else:
        assert _count(function, MATRIX) == expected


def test_what_cannot_be_counted_is_refused():
    def until_large(x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y * 2, x)

    with pytest.raises(UserError, match=r"^while: its operations cannot be counted"):
        _count(until_large, MATRIX)


def test_a_step_costs_the_same_with_and_without_a_loop_over_its_layers(small_config):
    """Its products are three times those of the forward pass: for the loss, and for each side's gradient."""

    def count(**keys):
        train, optimizer = TrainSection(batch_size=8, seq_len=16, steps=2), OptimizerSection()
        config = RunConfig(model=small_config(scheme="pre", **keys), train=train, optimizer=optimizer)
        return operations(Program(config).trace_train_step().jaxpr.jaxpr)

    looped = count()
    assert looped == pytest.approx(count(scan_unroll=3), rel=1e-3)  # but for counters and indices
    model = small_config(scheme="pre")
    matrices = model.num_layers * (
        2 * model.d_model * model.num_heads * model.head_dim * 2 + 3 * model.d_model * model.mlp_dim
    )
    matrices += model.d_model * model.vocab_size
    scores = model.num_layers * 2 * 16 * model.num_heads * model.head_dim
    products = 3 * 2 * 8 * 16 * (matrices + scores)
    assert products < looped < 1.5 * products
