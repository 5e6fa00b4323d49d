"""Whether a tree holds the parameters of a model of a configuration: before a conversion, and after it."""

from collections.abc import Collection
from typing import Any

import chex
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

from hybridnorm_jax.equivalence.layout import LayoutError
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.config import ModelConfig


def check_params(config: ModelConfig, params: Any) -> None:
    """Raise LayoutError unless params, which a caller gave, are the tree of build_model(config), in one dtype."""
    if not isinstance(params, dict | FrozenDict):
        raise LayoutError(f"params: must be the tree of build_model(config), not {type(params).__name__}")
    expected, found = flatten_dict(abstract_params(config), sep="/"), flatten_dict(params, sep="/")
    for path in (*expected, *found):
        if path not in found:
            raise LayoutError(f"{path}: missing; params must be the tree of build_model(config), variables['params']")
        if path not in expected:
            raise LayoutError(f"{path}: a model of this config has no such parameter")
    first = _embedding(expected)
    for path in expected:
        shape, dtype = getattr(found[path], "shape", None), getattr(found[path], "dtype", None)
        if shape != expected[path].shape:
            raise LayoutError(f"{path}: has shape {shape}, but a model of this config has {expected[path].shape}")
        if dtype != found[first].dtype:
            raise LayoutError(f"{path}: is {dtype}, but {first} is {found[first].dtype}")


def assert_params(config: ModelConfig, params: Any) -> None:
    """Assert, from shapes and dtypes alone, that a model of this config has these params, leaf by leaf.

    Raises:
      AssertionError: names the first leaf that is missing, left over (a norm's scale not folded, say) or not as it
        has to be.
    """
    expected, found = flatten_dict(abstract_params(config), sep="/"), flatten_dict(params, sep="/")
    dtype = jnp.asarray(found[_embedding(found)]).dtype
    for path in sorted(expected.keys() | found.keys()):
        if path not in found:
            raise AssertionError(f"{path}: missing")
        if path not in expected:
            folded = path.endswith(("scale", "bias")) and "norm/" in path
            raise AssertionError(f"{path}: {'is left unfolded' if folded else 'has no place in this model'}")
        chex.assert_rank(found[path], expected[path].ndim, custom_message=path)
        chex.assert_shape(found[path], expected[path].shape, custom_message=path)
        chex.assert_type(found[path], dtype, custom_message=path)


def _embedding(paths: Collection[str]) -> str:
    """The leaf whose dtype all others must have: the last by its path of those in front of the blocks."""
    return max(path for path in paths if path.partition("/")[0].endswith("_embedding"))
