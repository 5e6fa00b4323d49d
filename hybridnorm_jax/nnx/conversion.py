"""Parameters between an NNX module and the Linen tree: the same arrays under the same paths."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from hybridnorm_jax.errors import UserError


def to_linen_params(module: nnx.Module) -> dict[str, Any]:
    """The parameters as the nested dicts that the Linen module of the same name takes: {"params": here}.

    Args:
      module: one of this package's, or any other NNX module: all its nnx.Param's are returned.
    """
    params: dict[str, Any] = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return params


def from_linen_params(module: nnx.Module, params: Mapping[str, Any]) -> None:
    """Put the parameters of the Linen module of the same name into `module`, which keeps nothing of its own.

    Works on traced arrays too, so that a jitted function can initialize a module on a mesh.

    Raises:
      UserError: a parameter is missing, is one too many, or has another shape or dtype; names the first.
    """
    state = nnx.state(module, nnx.Param)
    if set(params) == {"params"}:
        raise UserError('params: gives {"params": ...}; give what is inside')
    pure = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), unfreeze(dict(params)))
    _check_same_leaves(expected=nnx.to_pure_dict(state), given=pure)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, pure))
    nnx.update(module, state)


def _check_same_leaves(expected: dict[str, Any], given: dict[str, Any]) -> None:
    ours, theirs = flatten_dict(expected), flatten_dict(given)
    for path in sorted({*ours, *theirs}):
        name = "/".join(map(str, path))
        if path not in theirs:
            raise UserError(f"{name}: missing; the module has such a parameter")
        if path not in ours:
            raise UserError(f"{name}: the module has no such parameter")
        wanted, found = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (ours[path], theirs[path]))
        if wanted != found:
            raise UserError(f"{name}: is {found}, but the module's is {wanted}")
