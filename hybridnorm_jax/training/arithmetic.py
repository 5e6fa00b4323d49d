"""The arithmetic operations of a program, counted from what JAX traced, before any compiler has seen it."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from hybridnorm_jax.errors import UserError

# What moves numbers or makes them from nothing, and the bits of random numbers.
_MOVING = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "iota",
    "name",
    "optimization_barrier",
    "pad",
    "random_bits",
    "random_fold_in",
    "random_seed",
    "random_unwrap",
    "random_wrap",
    "reshape",
    "rev",
    "scatter",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
}
_SCATTERED_SUMS = {"scatter-add", "scatter_add"}
# Inside of these nobody knows how often what is done.
_OPAQUE = {"pallas_call", "while", "ffi_call", "custom_call"}


def operations(jaxpr: Jaxpr) -> int:
    """How many arithmetic operations a program makes, the same on every device and however it is compiled.

    A product of matrices of m x k and k x n numbers has 2 m k n. Element by element each result is one operation,
    whatever the function, and a reduction has one for each number that it reads. The body of a scan counts as often as
    it runs, of a branch the dearer side. What moves or makes numbers (reshapes, look-ups, random bits) counts nothing.

    Raises:
      UserError: there is a kernel or a loop in it that cannot be counted.
    """
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        return _of_product(equation)
    if name in _MOVING:
        return 0
    if name in _SCATTERED_SUMS:
        return _size(equation.invars[-1])
    if name in _OPAQUE:
        raise UserError(f"{name}: its operations cannot be counted; that needs model.attention=xla and no kernels")
    inner = [operations(each) for each in _inner(equation.params)]
    if name == "cond":
        return max(inner)
    if inner:
        return sum(inner) * _times(equation)
    # Element by element, or a reduction.
    return max(map(_size, [*equation.invars, *equation.outvars]), default=0)


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)


def _times(equation: Any) -> int:
    """How often what is inside of an equation runs: the steps of a scan, or all devices of a shard_map."""
    if equation.primitive.name == "scan":
        return int(equation.params["length"])
    if equation.primitive.name == "shard_map":
        return int(equation.params["mesh"].size)
    return 1


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _size(variable: Var | Literal) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))
