"""SwiGLU experts, each on the tokens that chose it, and the choice of what computes them.

dense: every expert on every token; the reference. The others sort the rows by expert first: blocked (ours, on any
platform), ragged (jax.lax.ragged_dot) and gmm (jax.experimental.pallas.ops.tpu.megablox, on a TPU).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridnorm_jax.fields import check, check_choice
from hybridnorm_jax.kernels.blocked_experts import blocked, dot, pad_rows, swiglu, wide_dtype
from hybridnorm_jax.kernels.names import EXPERT_DISPATCHES

KEY = "model.expert_dispatch"

Tokens = Float[Array, "tokens embed"]
Rows = Float[Array, "rows embed"]
InputKernels = Float[Array, "experts embed mlp"]
OutputKernels = Float[Array, "experts mlp embed"]
GroupSizes = Int[Array, " experts"]

_GMM_DTYPES = ("bfloat16", "float32")


def resolve_dispatch(name: str, *, platform: str | None, dtype: Any) -> str:
    """The dispatch that `name` stands for: itself, or for "auto" gmm where it can run and blocked elsewhere.

    Args:
      name: auto | dense | blocked | ragged | gmm.
      platform: of the devices that will run it: cpu | gpu | tpu; None for a named dispatch: not checked.
      dtype: of the tokens and the kernels.

    Raises:
      ConfigError: the named dispatch cannot do this; the message says why.
    """
    check_choice(KEY, name, EXPERT_DISPATCHES)
    if name == "auto":
        return "gmm" if platform == "tpu" and _obstacle("gmm", platform, dtype) is None else "blocked"
    reason = _obstacle(name, platform, dtype)
    check(reason is None, KEY, name, f"{reason}; use auto or blocked")
    return name


def _obstacle(name: str, platform: str | None, dtype: Any) -> str | None:
    """Why this dispatch cannot do it, or None."""
    if name != "gmm":
        return None
    if platform not in (None, "tpu"):
        return f"needs platform tpu, this is {platform}"
    if jnp.dtype(dtype).name not in _GMM_DTYPES:
        return f"needs model.dtype {' or '.join(_GMM_DTYPES)}, not {jnp.dtype(dtype).name}"
    return None


def apply_experts(
    x: Tokens,
    gate: InputKernels,
    up: InputKernels,
    down: OutputKernels,
    weights: Float[Array, "tokens k"],
    chosen: Int[Array, "tokens k"],
    *,
    dispatch: str,
    elsewhere: bool = False,
) -> Tokens:
    """y_t = sum_j weights[t, j] down[e](silu(x_t gate[e]) * (x_t up[e])), e = chosen[t, j]; no token is dropped.

    The result has x's dtype, as have gate's and up's products; all sums run in float32 at least. Memory is
    O(tokens k); O(tokens experts) with dense, and with ragged where XLA expands it, as on a CPU. Reverse-mode
    differentiable in x, gate, up, down and weights.

    Args:
      gate, up, down: of x's dtype.
      chosen: expert ids below `experts`, different ones for one token.
      dispatch: as in resolve_dispatch. "auto" asks for the default platform; a named dispatch is taken at its word, so
        that one can compile for a platform that is not here.
      elsewhere: ids from 0 to experts - 1 are these experts, all others are not here and add nothing: what one device
        of several computes that share the experts. It needs what apply_grouped_experts needs of jax.shard_map.

    Raises:
      ConfigError: the named dispatch cannot do this.
      ValueError: shapes or dtypes that do not belong together, more choices than experts; names the argument.
    """
    _check_kernels("x", x, gate, up, down)
    experts = len(gate)
    _check_rank("chosen", chosen, 2)
    _check_shape("chosen", chosen, (len(x), chosen.shape[1]))
    _check_shape("weights", weights, chosen.shape)
    if not elsewhere and not 1 <= chosen.shape[1] <= experts:
        raise ValueError(f"chosen: k={chosen.shape[1]} must be between 1 and the number of experts, {experts}")
    dispatch = _resolve_here(dispatch, x.dtype)
    if dispatch == "dense":  # compares ids, so that others have no weight
        return _dense(x, gate, up, down, weights, chosen)
    if elsewhere:  # one more group, behind those that are here
        chosen = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts)
    order, slots, sizes = sort_by_expert(chosen, experts + elsewhere)
    apply_rows = functools.partial(apply_grouped_experts, dispatch=dispatch) if elsewhere else _GROUPED[dispatch]
    rows, row_weights = spread(x, order, slots), weights.reshape(-1)[order]
    return collect(apply_rows(rows, row_weights, sizes[:experts], gate, up, down), order, slots)


def apply_grouped_experts(
    rows: Rows,
    row_weights: Float[Array, " rows"],
    sizes: GroupSizes,
    gate: InputKernels,
    up: InputKernels,
    down: OutputKernels,
    *,
    dispatch: str,
) -> Rows:
    """row_weights_i down[e](silu(rows_i gate[e]) * (rows_i up[e])) for rows sorted by expert e, sizes[e] for each.

    The sizes may cover fewer rows than there are: rows past the last group are zero in the result, and so are their
    gradients, whatever these rows, their weights and their cotangents hold, NaN included. jax.shard_map needs
    check_vma=False around it, as around every loop or kernel with a gradient of its own. Dtypes, memory, `dispatch`
    and errors: as in apply_experts.
    """
    _check_kernels("rows", rows, gate, up, down)
    _check_shape("row_weights", row_weights, rows.shape[:1])
    _check_shape("sizes", sizes, gate.shape[:1])
    sizes = sizes.astype(jnp.int32)
    covered = jnp.arange(len(rows)) < sizes.sum()
    rows = jnp.where(covered[:, None], rows, 0)
    row_weights = jnp.where(covered, row_weights, 0)
    outputs = _GROUPED[_resolve_here(dispatch, rows.dtype)](rows, row_weights, sizes, gate, up, down)
    return jnp.where(covered[:, None], outputs, 0)


def _resolve_here(dispatch: str, dtype: Any) -> str:
    return resolve_dispatch(dispatch, platform=jax.default_backend() if dispatch == "auto" else None, dtype=dtype)


def _check_rank(name: str, array: Array, rank: int) -> None:
    if array.ndim != rank:
        raise ValueError(f"{name}: shape {array.shape} must have {rank} dimensions")


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape} must be {shape}")


def _check_kernels(name: str, x: Array, gate: Array, up: Array, down: Array) -> None:
    _check_rank(name, x, 2)
    _check_rank("gate", gate, 3)
    experts, _, mlp = gate.shape
    _check_shape("gate", gate, (experts, x.shape[1], mlp))
    _check_shape("up", up, gate.shape)
    _check_shape("down", down, (experts, mlp, x.shape[1]))
    for argument, kernels in (("gate", gate), ("up", up), ("down", down)):
        if kernels.dtype != x.dtype:
            raise ValueError(f"{argument}: dtype {kernels.dtype} must be that of {name}, {x.dtype}")


# ---- Sorting by expert. spread and collect are each other's transpose, so that both gradients gather, too: the
# ---- scatter-add that JAX would derive adds one row after the other on a CPU.


def sort_by_expert(
    chosen: Int[Array, "tokens k"], experts: int
) -> tuple[Int[Array, " rows"], Int[Array, "tokens k"], GroupSizes]:
    """(order, slots, sizes) of the tokens * k rows, sorted by expert and within one by token.

    Row i is choice order[i] of the flattened `chosen`; choice (t, j) is row slots[t, j]; expert e has sizes[e] rows.
    """
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    slots = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    return order, slots.reshape(chosen.shape), jnp.bincount(flat, length=experts).astype(jnp.int32)


@jax.custom_vjp
def spread(x: Tokens, order: Int[Array, " rows"], slots: Int[Array, "tokens k"]) -> Rows:
    """Row i is the token whose choice it is; order and slots from sort_by_expert."""
    return x[order // slots.shape[1]]


@jax.custom_vjp
def collect(rows: Rows, order: Int[Array, " rows"], slots: Int[Array, "tokens k"]) -> Tokens:
    """Each token's k rows summed, in float32 at least; order and slots from sort_by_expert."""
    return rows[slots].sum(1, dtype=wide_dtype(rows.dtype)).astype(rows.dtype)


spread.defvjp(lambda x, *places: (spread(x, *places), places), lambda places, d: (collect(d, *places), None, None))
collect.defvjp(lambda x, *places: (collect(x, *places), places), lambda places, d: (spread(d, *places), None, None))


# ---- dense


def _dense(x, gate, up, down, weights, chosen):
    one_hot = chosen[..., None] == jnp.arange(len(gate))
    weights = jnp.where(one_hot, weights[..., None], 0).sum(1)
    gated, upped = (dot("td,edm->tem", x, kernels).astype(x.dtype) for kernels in (gate, up))
    return dot("tem,emd->td", swiglu(gated, upped, weights), down).astype(x.dtype)


def _dense_grouped(rows, row_weights, sizes, gate, up, down):
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    return _dense(rows, gate, up, down, row_weights[:, None], expert[:, None])


# ---- ragged and gmm: three grouped products, one after the other


@jax.custom_vjp
def _ragged_product(rows: Rows, kernels: InputKernels, sizes: GroupSizes) -> Float[Array, "rows mlp"]:
    """rows_i kernels[e] in the dtype of rows, as are the gradient's operands, where JAX's own would be float32."""
    return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=wide_dtype(rows.dtype)).astype(rows.dtype)


def _ragged_product_backward(residuals, d_out):
    rows, kernels, sizes = residuals

    def general(a, b, contracting, ragged_dimension, group_dimensions):
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(contracting, ([], [])),
            lhs_ragged_dimensions=[ragged_dimension],
            rhs_group_dimensions=group_dimensions,
        )
        return jax.lax.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=wide_dtype(a.dtype)).astype(
            a.dtype
        )

    d_rows = general(d_out, kernels, ([1], [2]), 0, [0])
    return d_rows, general(rows, d_out, ([0], [0]), 0, []), None


_ragged_product.defvjp(lambda *arguments: (_ragged_product(*arguments), arguments), _ragged_product_backward)


def _gmm_product(rows: Rows, kernels: InputKernels, sizes: GroupSizes) -> Float[Array, "rows mlp"]:
    """rows_i kernels[e] in the dtype of rows, which the kernel sums in float32."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # imports Pallas, which takes a while

    # Not measured on a TPU. A tile of rows that two groups share is computed for each, so tiles are short against the
    # mean group; along embed and mlp they are the largest that fit into a v5e core's memory.
    tile_rows = next((size for size in (512, 256) if 4 * size * len(kernels) <= len(rows)), 128)
    largest = 1024 if rows.dtype.itemsize == 2 else 512
    inner = min(largest, *(128 * -(-size // 128) for size in kernels.shape[1:]))
    padded, tiling = pad_rows(rows, -len(rows) % tile_rows), (tile_rows, inner, inner)
    return gmm(padded, kernels, sizes, preferred_element_type=rows.dtype, tiling=tiling)[: len(rows)]


def _by_products(product: Callable, rows, row_weights, sizes, gate, up, down):
    # What a grouped product leaves in rows past the last group is undefined, and so is what it reads there: with
    # these rows zero in every operand and every cotangent, nothing of it reaches a gradient of a kernel.
    covered = (jnp.arange(len(rows)) < sizes.sum())[:, None]

    def covered_product(array, kernels):
        return jnp.where(covered, product(array, kernels, sizes), 0)

    hidden = swiglu(covered_product(rows, gate), covered_product(rows, up), row_weights)
    return covered_product(hidden, down)


_GROUPED = {
    "dense": _dense_grouped,
    "blocked": blocked,
    "ragged": functools.partial(_by_products, _ragged_product),
    "gmm": functools.partial(_by_products, _gmm_product),
}
