"""Comparison of two states of a run to the last bit."""

import jax
import numpy as np


def assert_bitwise(ours, expected):
    """Every leaf of two trees has the same shape, dtype and values; the first that has not is named by its path."""
    for (path, left), right in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(
            np.asarray(left), np.asarray(right), err_msg=jax.tree_util.keystr(path), strict=True
        )
