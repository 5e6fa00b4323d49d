"""Matrices whose vectors along the embedding have length 1, as nGPT (2410.01131) keeps them through training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.mesh.parameter_axes import logical_axes


def unit_matrices(params: Any) -> Any:
    """The tree of a Decoder with every vector along embed of every kernel and every table divided by its length.

    Which axis that is, PARAMETER_AXES says: the last one of tables and of what writes the stream, the first one of what
    reads it. Biases, norms and scales stay, and so do vectors of zeros. Lengths are taken in float32 at least. nGPT,
    section 2.1.
    """

    def normalized(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = tuple(part.key for part in path)
        if names[-1] not in ("kernel", "embedding"):
            return leaf
        axis = logical_axes(names, leaf.ndim).index("embed")
        wide = widened(leaf)
        length = jnp.linalg.norm(wide, axis=axis, keepdims=True)
        return (wide / jnp.where(length == 0, 1, length)).astype(leaf.dtype)

    return jax.tree.map_with_path(normalized, params)


def keep_unit_matrices() -> optax.GradientTransformation:
    """Updates that leave the matrices as unit_matrices makes them: the last transformation of an optax.chain.

        optimizer = optax.chain(optax.adam(1e-3), hn.keep_unit_matrices())

    Needs the parameters in `update`.
    """

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        if params is None:
            raise ValueError("params: keep_unit_matrices needs them, optimizer.update(gradient, state, params)")
        kept = unit_matrices(optax.apply_updates(params, updates))
        return jax.tree.map(lambda new, old: new - old, kept, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
