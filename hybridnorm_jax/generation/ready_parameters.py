"""Parameters as generation reads them, once for every token: narrow, and each layer in arrays of its own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hybridnorm_jax.model.config import ModelConfig

ROUNDED, KEPT_WIDE = ("kernel", "embedding"), ("router",)


def ready(config: ModelConfig, params: Any) -> Any:
    """The parameters of Decoder(config, unrolled=True), rounded; those that are so already are returned as they are.

    A loop over layers reads each layer's part of the stacked arrays, and XLA for CPUs and GPUs copies most parts before
    it uses them. In training that is little beside the products with many tokens; here it is as much as the rest.
    """
    if "run_0" not in params:
        return params
    lengths = tuple(run.length for run in config.runs)
    return _ready(params, lengths=lengths, dtype=config.dtype)


def rounded(config: ModelConfig, params: Any) -> Any:
    """The parameters, with those matrices in the compute dtype that the model rounds to it at every use.

    Every token reads all of them, so a narrow copy is read in half the time. The result of the model is the same, bit
    by bit: the router and the norms compute in float32, and stay as they are.
    """
    return jax.tree.map_with_path(partial(_rounded, dtype=config.dtype), params)


@partial(jax.jit, static_argnames=("lengths", "dtype"))
def _ready(params: Any, *, lengths: tuple[int, ...], dtype: str) -> Any:
    """In one program, so that a large model is not copied twice."""
    narrow = jax.tree.map_with_path(partial(_rounded, dtype=dtype), params)
    stacked = [narrow.pop(f"run_{number}") for number in range(len(lengths))]
    layers = [_one_of(run, place) for run, length in zip(stacked, lengths, strict=True) for place in range(length)]
    return narrow | {f"layer_{number}": layer for number, layer in enumerate(layers)}


def _one_of(run: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], run)


def _rounded(path: tuple[Any, ...], leaf: Any, *, dtype: str) -> jax.Array:
    *_, layer, name = (part.key for part in path)
    leaf, narrow = jnp.asarray(leaf), jnp.dtype(dtype)
    is_rounded = name in ROUNDED and layer not in KEPT_WIDE and leaf.dtype.itemsize > narrow.itemsize
    return leaf.astype(narrow) if is_rounded else leaf
