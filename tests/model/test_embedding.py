"""Rows of a table by their number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridnorm_jax.model.embedding import Embedding


@pytest.mark.parametrize("unknown", [5, 1000, -1, -5])
def test_an_id_that_the_table_does_not_have_gives_nan(unknown):
    """JAX alone would count -1 from the end, and take the last row."""
    module = Embedding(rows=5, width=2, std=1.0, dtype="float32", param_dtype="float32")
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rows = module.apply(params, jnp.array([[0, unknown, 4]]))
    table = np.asarray(params["params"]["embedding"])
    np.testing.assert_array_equal(rows, [[table[0], [np.nan, np.nan], table[4]]])
