"""Parameters as the computation reads them."""

from typing import Any

import jax
import jax.numpy as jnp

from hybridnorm_jax.model.config import ModelConfig

ROUNDED, KEPT_WIDE = ("kernel", "embedding"), ("router",)


def rounded(config: ModelConfig, params: Any) -> Any:
    """The parameters, with those matrices in the compute dtype that the model rounds to it at every use.

    Every token reads all of them, so a narrow copy is read in half the time. The result of the model is the same, bit
    by bit: the router and the norms compute in float32, and stay as they are.
    """
    dtype = jnp.dtype(config.dtype)

    def round_leaf(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        *_, layer, name = (part.key for part in path)
        leaf = jnp.asarray(leaf)
        is_rounded = name in ROUNDED and layer not in KEPT_WIDE and leaf.dtype.itemsize > dtype.itemsize
        return leaf.astype(dtype) if is_rounded else leaf

    return jax.tree.map_with_path(round_leaf, params)
