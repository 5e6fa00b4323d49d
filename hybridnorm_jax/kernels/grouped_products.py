"""The experts as three grouped products, one after the other; and the grouped product of XLA, jax.lax.ragged_dot.

A grouped product multiplies rows that are sorted by expert with their expert's kernel.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.expert_rows import GroupSizes, Rows
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.kernels.swiglu import ExpertKernels, InputKernels, swiglu

# (rows, kernels, sizes) -> rows; what it makes of rows past the last group is undefined.
GroupedProduct = Callable[[Rows, InputKernels, GroupSizes], Float[Array, "rows mlp"]]


def experts_by_products(
    product: GroupedProduct, rows: Rows, row_weights: Float[Array, " rows"], sizes: GroupSizes, kernels: ExpertKernels
) -> Rows:
    """experts.apply_grouped_experts by this grouped product."""
    # What a grouped product leaves in rows past the last group is undefined, and so is what it reads there. With
    # these rows zero in every operand and every cotangent, nothing of it reaches a gradient of a kernel.
    covered = (jnp.arange(len(rows)) < sizes.sum())[:, None]

    def covered_product(array: Rows, kernels: InputKernels) -> Float[Array, "rows mlp"]:
        return jnp.where(covered, product(array, kernels, sizes), 0)

    gated, upped = covered_product(rows, kernels.gate), covered_product(rows, kernels.up)
    return covered_product(swiglu(gated, upped, row_weights, kernels.clamp), kernels.down)


@jax.custom_vjp
def ragged_product(rows: Rows, kernels: InputKernels, sizes: GroupSizes) -> Float[Array, "rows mlp"]:
    """rows_i kernels[e] in the dtype of rows, as are the gradient's operands, where JAX's own would be float32."""
    return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=wide_dtype(rows.dtype)).astype(rows.dtype)


class _RaggedResiduals(NamedTuple):
    rows: Rows
    kernels: InputKernels
    sizes: GroupSizes


def _ragged_forward(
    rows: Rows, kernels: InputKernels, sizes: GroupSizes
) -> tuple[Float[Array, "rows mlp"], _RaggedResiduals]:
    return ragged_product(rows, kernels, sizes), _RaggedResiduals(rows, kernels, sizes)


def _ragged_backward(residuals: _RaggedResiduals, d_out: Float[Array, "rows mlp"]) -> tuple[Rows, InputKernels, None]:
    rows, kernels, sizes = residuals
    # Row by row over the hidden layer; and, for each group, the sum over its rows.
    d_rows = _ragged_dot_general(d_out, kernels, sizes, contracting=([1], [2]), group_dimensions=[0])
    d_kernels = _ragged_dot_general(rows, d_out, sizes, contracting=([0], [0]), group_dimensions=[])
    return d_rows, d_kernels, None


def _ragged_dot_general(
    rows: Array,
    operand: Array,
    sizes: GroupSizes,
    *,
    contracting: tuple[Sequence[int], Sequence[int]],
    group_dimensions: Sequence[int],
) -> Array:
    """A grouped product in the dtype of rows, summed in float32 at least.

    Args:
      contracting: the dimensions of rows and of operand that are summed over.
      group_dimensions: the dimension of operand, if any, that counts the groups.
    """
    no_batch = ([], [])
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, no_batch),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group_dimensions,
    )
    wide = wide_dtype(rows.dtype)
    product = jax.lax.ragged_dot_general(rows, operand, sizes, numbers, preferred_element_type=wide)
    return product.astype(rows.dtype)


ragged_product.defvjp(_ragged_forward, _ragged_backward)
