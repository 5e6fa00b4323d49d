"""Adafactor: second moments of matrices as a sum over rows and one over columns (1804.04235)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.training.optimizers.matrices import MatrixAxes, batch_axes, matrix_axes

# The paper's epsilon 1 and 2: added to squares, and the least size of a parameter.
EPS_SQUARE, LEAST_SIZE = 1e-30, 1e-3


class FactoredMoments(NamedTuple):
    """Means of squared gradients.

    Attributes:
      count: updates made.
      rows, columns: of matrices, over their output and over their input channels; those axes are kept with size 1, so
        that the moments lie on a mesh as their parameters do. optax.MaskedNode for all others.
      whole: of all others, number by number; optax.MaskedNode for matrices.
    """

    count: Int[Array, ""]
    rows: Any
    columns: Any
    whole: Any


def scale_by_adafactor(config: OptimizerSection) -> optax.GradientTransformation:
    """The direction of Adafactor for every single matrix and vector of a model.

        r_t = b r_{t-1} + (1 - b) mean(g^2 + 1e-30) over columns, c_t likewise over rows, b = 1 - t^-adafactor_decay
        u = g / sqrt(r c / mean(r)),  u <- u / max(1, rms(u) / adafactor_clip),  u <- u max(1e-3, rms(p))

    The last with optimizer.adafactor_scale. Algorithms 4 and 5 of the paper; b_1 = 0, so there is no first moment.

    Optax's factors the two largest axes of an array and takes means over all of it. Here an array holds one matrix for
    each layer of a run, so that the steps would depend on how many layers are compiled together.
    """

    def init(params: Any) -> FactoredMoments:
        def mean_over(path: tuple[Any, ...], leaf: Array, part: str) -> Any:
            axes = matrix_axes(path, leaf.ndim)
            return optax.MaskedNode() if axes is None else jnp.zeros_like(_mean(leaf, getattr(axes, part)))

        def whole(path: tuple[Any, ...], leaf: Array) -> Any:
            return jnp.zeros_like(leaf) if matrix_axes(path, leaf.ndim) is None else optax.MaskedNode()

        return FactoredMoments(
            jnp.zeros((), jnp.int32),
            jax.tree.map_with_path(lambda path, leaf: mean_over(path, leaf, "outputs"), params),
            jax.tree.map_with_path(lambda path, leaf: mean_over(path, leaf, "inputs"), params),
            jax.tree.map_with_path(whole, params),
        )

    def update(gradients: Any, state: FactoredMoments, params: Any = None) -> tuple[Any, FactoredMoments]:
        count = optax.safe_increment(state.count)
        new = count.astype(jnp.float32) ** -config.adafactor_decay

        def of_leaf(path: tuple[Any, ...], gradient: Array, parameter: Array, *moments: Any) -> "_Moved":
            axes = matrix_axes(path, gradient.ndim)
            moved = _vector(gradient, moments[2], new) if axes is None else _matrix(gradient, moments[:2], new, axes)
            within = tuple(range(len(batch_axes(path, gradient.ndim)), gradient.ndim))
            direction = moved.direction / jnp.maximum(1, _rms(moved.direction, within) / config.adafactor_clip)
            if config.adafactor_scale:
                direction *= jnp.maximum(LEAST_SIZE, _rms(parameter, within))
            return moved._replace(direction=direction)

        moved = jax.tree.map_with_path(of_leaf, gradients, params, state.rows, state.columns, state.whole)

        def part(name: str) -> Any:
            return jax.tree.map(lambda each: getattr(each, name), moved, is_leaf=lambda x: isinstance(x, _Moved))

        return part("direction"), FactoredMoments(count, part("rows"), part("columns"), part("whole"))

    return optax.GradientTransformation(init, update)


class _Moved(NamedTuple):
    """What an update makes of one parameter."""

    direction: Array
    rows: Any = optax.MaskedNode()
    columns: Any = optax.MaskedNode()
    whole: Any = optax.MaskedNode()


def _matrix(gradient: Array, moments: Any, new: Array, axes: MatrixAxes) -> _Moved:
    square = jnp.square(gradient) + EPS_SQUARE
    rows = _blended(moments[0], _mean(square, axes.outputs), new)
    columns = _blended(moments[1], _mean(square, axes.inputs), new)
    # The two roots apart: their product could be too small for float32.
    direction = gradient * jax.lax.rsqrt(rows / _mean(rows, axes.inputs)) * jax.lax.rsqrt(columns)
    return _Moved(direction, rows=rows, columns=columns)


def _vector(gradient: Array, moment: Array, new: Array) -> _Moved:
    whole = _blended(moment, jnp.square(gradient) + EPS_SQUARE, new)
    return _Moved(gradient * jax.lax.rsqrt(whole), whole=whole)


def _blended(before: Array, now: Array, new: Array) -> Array:
    share = new.astype(before.dtype)
    return (1 - share) * before + share * now


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.mean(x, axes, keepdims=True)


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(_mean(jnp.square(x), axes))
