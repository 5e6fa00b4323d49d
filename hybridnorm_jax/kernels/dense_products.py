"""Products of activations with a kernel, such as those of the projections, the router and the head.

The gradient of a kernel sums over all positions of all sequences. XLA for CPUs sums over one of two such dimensions at
a time, and copies an operand transposed before it. So there the positions are one dimension of rows.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.precision import wide_dtype

# ((contracted dimensions of x, of the kernel), (batch dimensions of x, of the kernel)), as of jax.lax.dot_general.
Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def dot_general(
    x: Float[Array, "batch seq ..."],
    kernel: Float[Array, "..."],
    dimension_numbers: Dimensions,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "batch seq ..."]:
    """The product of the feed-forward's projections, as the `dot_general` of nn.Dense; otherwise rows_product.

    On a TPU the gradient of the kernel is computed before that of x. XLA, left alone, computes it last, and meanwhile
    keeps the gradients of gate and up, which are the largest arrays of a layer.
    """
    if traced_platform() != "tpu":
        return rows_product(x, kernel, dimension_numbers, precision, preferred_element_type)
    options = _Options(dimension_numbers, precision, preferred_element_type)
    return _kernel_gradient_first(x, kernel, options)


class _Options(NamedTuple):
    """Of jax.lax.dot_general."""

    dimension_numbers: Dimensions
    precision: Any
    preferred_element_type: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient_first(x: Array, kernel: Array, options: _Options) -> Array:
    return jax.lax.dot_general(x, kernel, **options._asdict())


def _forward(x: Array, kernel: Array, options: _Options) -> tuple[Array, tuple[Array, Array]]:
    return _kernel_gradient_first(x, kernel, options), (x, kernel)


def _backward(options: _Options, factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = factors
    _, to_kernel = jax.vjp(lambda kernel: jax.lax.dot_general(x, kernel, **options._asdict()), kernel)
    _, to_x = jax.vjp(lambda x: jax.lax.dot_general(x, kernel, **options._asdict()), x)
    (d_kernel,) = to_kernel(gradient)
    gradient, d_kernel = jax.lax.optimization_barrier((gradient, d_kernel))
    (d_x,) = to_x(gradient)
    return d_x, d_kernel


_kernel_gradient_first.defvjp(_forward, _backward)


def rows_product(
    x: Float[Array, "batch seq ..."],
    kernel: Float[Array, "..."],
    dimension_numbers: Dimensions,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "batch seq ..."]:
    """jax.lax.dot_general(x, kernel, ...), on one CPU device as the product of two matrices.

    The matrices are x as (batch * seq, inputs) and the kernel as (inputs, outputs) or (outputs, inputs). On a mesh of
    more than one device the dimensions stay apart, because they may be split over different axes; and on a GPU or TPU
    too, whose compilers need no help. The result is the same up to the order of the sums.

    Args:
      x: contracts its last dimensions, in order.
      kernel: contracts its first dimensions, in order, or its last.
      dimension_numbers, precision, preferred_element_type: as of jax.lax.dot_general, so that this function can be the
        `dot_general` of nn.Dense and nn.DenseGeneral.
    """
    (of_x, of_kernel), of_batch = dimension_numbers
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    rows, inputs = x.shape[: x.ndim - len(of_x)], x.shape[x.ndim - len(of_x) :]
    # One token of every sequence, or one sequence, is a matrix already: so a step of generation is as it was.
    is_matrix = sum(size > 1 for size in rows) < 2
    is_plain = of_batch == ((), ()) and tuple(of_x) == tuple(range(len(rows), x.ndim))
    is_first = tuple(of_kernel) == tuple(range(len(of_kernel)))
    is_last = tuple(of_kernel) == tuple(range(kernel.ndim - len(of_kernel), kernel.ndim))
    if is_matrix or not is_plain or not (is_first or is_last) or not _on_one_cpu():
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    outputs = kernel.shape[len(inputs) :] if is_first else kernel.shape[: kernel.ndim - len(inputs)]
    width, matrix = math.prod(inputs), x.reshape(math.prod(rows), math.prod(inputs))
    if is_first:
        product = jax.lax.dot_general(matrix, kernel.reshape(width, -1), (((1,), (0,)), ((), ())), **options)
    else:
        product = jax.lax.dot_general(matrix, kernel.reshape(-1, width), (((1,), (1,)), ((), ())), **options)
    return product.reshape(*rows, *outputs)


def head_product(
    x: Float[Array, "batch seq embed"], kernel: Float[Array, "..."], dimension_numbers: Dimensions
) -> Float[Array, "batch seq vocab"]:
    """The logits: x times the kernel rounded to x's dtype, summed and returned in float32 at least.

    On a GPU the gradient of the logits is rounded to x's dtype as well before it is multiplied, as a TPU does by
    itself: in float32 its two products would take at least twice the time. They are summed in float32 at least.
    """
    if traced_platform() == "gpu" and wide_dtype(x.dtype) != x.dtype:
        return _narrow_gradient_product(x, kernel, dimension_numbers)
    return _wide_product(x, kernel, dimension_numbers)


def _wide_product(x: Array, kernel: Array, dimension_numbers: Dimensions) -> Array:
    accumulate = wide_dtype(x.dtype)
    return rows_product(x, kernel.astype(x.dtype), dimension_numbers, preferred_element_type=accumulate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_gradient_product(x: Array, kernel: Array, dimension_numbers: Dimensions) -> Array:
    return _wide_product(x, kernel, dimension_numbers)


def _narrow_forward(x: Array, kernel: Array, dimension_numbers: Dimensions) -> tuple[Array, tuple[Array, Array]]:
    return _wide_product(x, kernel, dimension_numbers), (x, kernel)


def _narrow_backward(
    dimension_numbers: Dimensions, factors: tuple[Array, Array], d_logits: Array
) -> tuple[Array, Array]:
    x, kernel = factors
    ((_,), (contracted,)), _ = dimension_numbers
    narrow, wide = d_logits.astype(x.dtype), wide_dtype(x.dtype)
    # The gradient by a kernel of (vocab, embed) or (embed, vocab); and the gradient by x, over batch and seq.
    to_x = (((2,), (1 - contracted,)), ((), ()))
    over_rows = (((0, 1), (0, 1)), ((), ()))
    d_x = jax.lax.dot_general(narrow, kernel.astype(x.dtype), to_x, preferred_element_type=wide)
    pair = (narrow, x) if contracted == 1 else (x, narrow)
    d_kernel = jax.lax.dot_general(*pair, over_rows, preferred_element_type=wide)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_narrow_gradient_product.defvjp(_narrow_forward, _narrow_backward)


def _on_one_cpu() -> bool:
    """Whether the program that is being traced is for one CPU device, as far as mesh and default devices say."""
    mesh = jax.sharding.get_abstract_mesh()
    return traced_platform() == "cpu" and (jax.device_count() if mesh.empty else mesh.size) == 1


def traced_platform() -> str | None:
    """Of the devices that the program that is being traced is for, as far as mesh and default devices say."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    return None if mesh.abstract_device is None else mesh.abstract_device.platform
