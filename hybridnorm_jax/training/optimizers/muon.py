"""Muon: the momentum of every matrix, made orthogonal (Jordan et al., https://kellerjordan.github.io/posts/muon)."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.kernels.precision import wide_dtype, widened
from hybridnorm_jax.mesh.parameter_axes import logical_axes
from hybridnorm_jax.mesh.sharding_rules import Rules
from hybridnorm_jax.mesh.shardings import partition_spec
from hybridnorm_jax.training.optimizers.groups import check_patterns, path_text
from hybridnorm_jax.training.optimizers.matrices import MatrixAxes, matrix_axes
from hybridnorm_jax.training.optimizers.whole_matrices import on_whole_matrices

# Of the authors: five steps bring all singular values from above 1e-3 or so to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEAST_NORM = 1e-7


class MuonState(NamedTuple):
    """The mean of gradients, new ones with the weight 1 - muon_momentum."""

    momentum: Any


def is_muon_matrix(config: OptimizerSection, path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether Muon updates this parameter: a kernel inside a block, of each layer and expert one matrix.

    Embeddings and heads are no such kernels, and neither is anything inside a norm; a kernel with one row or column is
    a vector. optimizer.muon_except names further ones that are left to AdamW.
    """
    name = path_text(path)
    if not (name.startswith("run_") and name.endswith("/kernel")):
        return False
    axes = matrix_axes(path, leaf.ndim)
    is_vector = axes is None or min(axes.sizes(leaf.shape)) == 1
    return not is_vector and not any(fnmatchcase(name, pattern) for pattern in config.muon_except)


def muon_or(
    other: optax.GradientTransformation, config: OptimizerSection, mesh: Mesh | None, rules: Rules
) -> optax.GradientTransformation:
    """Muon for the matrices, and `other` for everything else."""

    def labels(params: Any) -> Any:
        check_patterns("optimizer.muon_except", config.muon_except, params)
        return jax.tree.map_with_path(
            lambda path, leaf: "muon" if is_muon_matrix(config, path, leaf) else "other", params
        )

    return optax.partition({"muon": scale_by_muon(config, mesh, rules), "other": other}, labels)


def scale_by_muon(config: OptimizerSection, mesh: Mesh | None, rules: Rules) -> optax.GradientTransformation:
    """The direction of Muon for every single matrix.

        m_t = b m_{t-1} + (1 - b) g_t,  s = b m_t + (1 - b) g_t,  direction = scale * orthogonal(s)

    with b = muon_momentum, and the scale of update_scale; without optimizer.muon_nesterov s is m_t. Optax's corrects m
    and g for their bias before it adds them, so its first directions are others than the authors'; and it makes one
    axis of layers and experts, which a mesh that splits experts would have to gather.

    Args:
      mesh: whose devices share the matrices; None: one device has all.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        def blended(before: Array, now: Array) -> Array:
            return config.muon_momentum * before + (1 - config.muon_momentum) * now

        momentum = jax.tree.map(blended, state.momentum, gradients)
        steered = jax.tree.map(blended, momentum, gradients) if config.muon_nesterov else momentum
        directions = jax.tree.map_with_path(lambda path, x: _direction(path, x, config, mesh, rules), steered)
        return directions, MuonState(momentum)

    return optax.GradientTransformation(init, update)


def update_scale(convention: str, inputs: int, outputs: int) -> float:
    """What an orthogonal matrix of so many input and output channels is multiplied by.

    original         sqrt(max(1, outputs / inputs)), of Jordan's Muon; rates near 0.02 are usual
    match_rms_adamw  0.2 sqrt(max(inputs, outputs)): entries have an RMS near 0.2, as AdamW's updates have, whose
                     rates and weight decays then fit (2502.16982, section 2.2)
    """
    if convention == "original":
        return max(1.0, outputs / inputs) ** 0.5
    return 0.2 * max(inputs, outputs) ** 0.5


def orthogonalized(x: Float[Array, "*batch rows columns"], *, steps: int) -> Float[Array, "*batch rows columns"]:
    """Matrices with singular values near 1 and the singular vectors of x, by Newton and Schulz's iteration.

        X <- a X + (b X X^T + c (X X^T)^2) X

    Args:
      x: with singular values of at most 1; all products are in its dtype.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = jnp.matmul(x, x.mT, precision="highest")
        polynomial = b * gram + c * jnp.matmul(gram, gram, precision="highest")
        x = a * x + jnp.matmul(polynomial, x, precision="highest")
    return x.mT if is_tall else x


def _direction(
    path: tuple[Any, ...], steered: Array, config: OptimizerSection, mesh: Mesh | None, rules: Rules
) -> Array:
    axes = matrix_axes(path, steered.ndim)
    assert axes is not None  # is_muon_matrix
    scale = update_scale(config.muon_scale, *axes.sizes(steered.shape))
    # The norm is taken of the shares, and what travels is as narrow as what is computed with.
    wide = widened(steered)
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axes.of_matrix, keepdims=True))
    dtype = jnp.bfloat16 if config.muon_dtype == "bfloat16" else wide_dtype(steered.dtype)
    unit = (wide / jnp.maximum(norm, LEAST_NORM)).astype(dtype)
    function = _as_matrices(axes, config.muon_steps)
    if mesh is None:
        return scale * function(unit).astype(steered.dtype)
    names = tuple(path_text(path).split("/"))
    spec = partition_spec(logical_axes(names, unit.ndim), unit.shape, mesh, rules)
    result = on_whole_matrices(function, unit, spec, mesh, batch=len(axes.batch))
    return scale * result.astype(steered.dtype)


def _as_matrices(axes: MatrixAxes, steps: int) -> Callable[[Array], Array]:
    """`orthogonalized`, of arrays whose rows or columns lie along several axes."""

    def function(x: Array) -> Array:
        batch = tuple(x.shape[axis] for axis in axes.batch)
        matrices = x.reshape((*batch, *axes.sizes(x.shape)))
        return orthogonalized(matrices, steps=steps).reshape(x.shape)

    return function
