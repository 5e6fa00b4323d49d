"""SwiGLU experts, each on the tokens that chose it, and the choice of what computes them.

dense computes every expert on every token; it is the reference. The others sort the rows by expert first: blocked
(ours, on any platform), ragged (jax.lax.ragged_dot, on a CPU or TPU), on a TPU gmm (jax.experimental.pallas.ops.tpu.
megablox) and fused (ours), and on a GPU grouped (ours).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import check, check_choice
from hybridnorm_jax.kernels.backend_names import EXPERT_DISPATCHES
from hybridnorm_jax.kernels.blocked_experts import blocked
from hybridnorm_jax.kernels.expert_rows import GroupSizes, Rows, Tokens, collect, sort_by_expert, spread
from hybridnorm_jax.kernels.grouped_products import experts_by_products, ragged_product
from hybridnorm_jax.kernels.precision import wide_einsum
from hybridnorm_jax.kernels.segments import Segments, expert_of_rows, segments_of_groups
from hybridnorm_jax.kernels.swiglu import ExpertKernels, swiglu

KEY = "model.expert_dispatch"

_TPU_DTYPES = ("bfloat16", "float32")
# Of each dispatch by kernels, the first choice first: the platform, and the dtypes.
_KERNELS = {
    "fused": ("tpu", _TPU_DTYPES),
    "gmm": ("tpu", _TPU_DTYPES),
    "grouped": ("gpu", ("bfloat16", "float16", "float32")),
}
# Their kernels compute the hidden layer, and know no other.
_SWIGLU_ONLY = ("fused", "grouped")


class ExpertSize(NamedTuple):
    """The channels that an expert reads and returns, and those of its hidden layer."""

    embed: int
    mlp: int


def resolve_dispatch(
    name: str, *, platform: str | None, dtype: Any, size: ExpertSize | None = None, clamped: bool = False
) -> str:
    """The dispatch that computes the experts: the named one, or the one that "auto" stands for.

    "auto" is on a TPU fused, or gmm where an expert is too large for it or clamped, on a GPU grouped unless experts are
    clamped, and blocked elsewhere.

    Args:
      name: auto | dense | blocked | ragged | gmm | fused | grouped.
      platform: of the devices that will run it: cpu | gpu | tpu. With None a named dispatch's platform is not checked.
      dtype: of the tokens and the kernels.
      size: of each expert on one device; None where that is not to be checked.
      clamped: whether experts are swiglu_clamped, and not swiglu.

    Raises:
      ConfigError: the named dispatch cannot do this; the message says why.
    """
    check_choice(KEY, name, EXPERT_DISPATCHES)
    if name == "auto":
        candidates = [each for each, (needed, _) in _KERNELS.items() if needed == platform]
        return next((each for each in candidates if _obstacle(each, platform, dtype, size, clamped) is None), "blocked")
    reason = _obstacle(name, platform, dtype, size, clamped)
    check(reason is None, KEY, name, f"{reason}; use auto or blocked")
    return name


def _obstacle(name: str, platform: str | None, dtype: Any, size: ExpertSize | None, clamped: bool) -> str | None:
    """Why this dispatch cannot do it, or None."""
    if name == "ragged" and platform == "gpu":
        return "XLA computes every row by every expert on a GPU, as many times the work as there are experts"
    if name not in _KERNELS:
        return None
    needed, dtypes = _KERNELS[name]
    if platform not in (None, needed):
        return f"needs platform {needed}, this is {platform}"
    if jnp.dtype(dtype).name not in dtypes:
        return f"needs model.dtype {' or '.join(dtypes)}, not {jnp.dtype(dtype).name}"
    if clamped and name in _SWIGLU_ONLY:
        return "has SwiGLU inside its kernels, and these experts are model.activation=swiglu_clamped"
    if name == "fused" and size is not None:
        from hybridnorm_jax.kernels.tpu_fused import fits  # imports Pallas, which takes a while

        if not fits(size.embed, size.mlp, dtype):
            return f"has no room in a core for experts of {size.embed} x {size.mlp} channels; use gmm"
    return None


def apply_experts(
    x: Tokens,
    kernels: ExpertKernels,
    weights: Float[Array, "tokens k"],
    chosen: Int[Array, "tokens k"],
    *,
    dispatch: str,
    elsewhere: bool = False,
) -> Tokens:
    """y_t = sum_j weights[t, j] down[e](silu(x_t gate[e]) * (x_t up[e])), e = chosen[t, j]; no token is dropped.

    With kernels.clamp the hidden layer is swiglu.clamped_swiglu instead.

    The result has x's dtype, as have gate's and up's products; all sums run in float32 at least. Memory is
    O(tokens k). It is O(tokens experts) with dense, and with ragged where XLA expands it, as on a CPU. Reverse-mode
    differentiable in x, kernels and weights.

    Args:
      kernels: of x's dtype.
      chosen: expert ids below `experts`, different ones for one token.
      dispatch: as in resolve_dispatch. "auto" looks at the default platform. A named dispatch is used whatever the
        platform is, so that one can compile for a platform that is not here.
      elsewhere: whether some ids are of experts that are not here, which add nothing: one device of several that share
        the experts computes this. The ids from 0 to experts - 1 are the experts that are here, all others are
        elsewhere. It needs of jax.shard_map what apply_grouped_experts needs.

    Raises:
      ConfigError: the named dispatch cannot do this.
      ValueError: shapes or dtypes that do not belong together, more choices than experts; names the argument.
    """
    _check_kernels("x", x, kernels)
    experts = len(kernels.gate)
    _check_rank("chosen", chosen, 2)
    _check_shape("chosen", chosen, (len(x), chosen.shape[1]))
    _check_shape("weights", weights, chosen.shape)
    if not elsewhere and not 1 <= chosen.shape[1] <= experts:
        raise ValueError(f"chosen: k={chosen.shape[1]} must be between 1 and the number of experts, {experts}")
    dispatch = _resolve_here(dispatch, kernels)
    if dispatch == "dense":  # compares ids, so that experts elsewhere have no weight
        return _dense(x, kernels, weights, chosen)
    if not elsewhere:
        order, sizes = sort_by_expert(chosen, experts)
        rows, row_weights = spread(x, order), weights.reshape(-1)[order.choice_of_row]
        return collect(_by_dispatch(dispatch, rows, row_weights, sizes, kernels), order)
    # Choices of experts elsewhere make one more group, behind those of the experts that are here.
    here = (chosen >= 0) & (chosen < experts)
    order, sizes = sort_by_expert(jnp.where(here, chosen, experts), experts + 1)
    rows, row_weights = spread(x, order), weights.reshape(-1)[order.choice_of_row]
    return collect(apply_grouped_experts(rows, row_weights, sizes[:experts], kernels, dispatch=dispatch), order)


def apply_grouped_experts(
    rows: Rows, row_weights: Float[Array, " rows"], sizes: GroupSizes, kernels: ExpertKernels, *, dispatch: str
) -> Rows:
    """row_weights_i down[e](silu(rows_i gate[e]) * (rows_i up[e])) for rows sorted by expert e, sizes[e] for each.

    The sizes may cover fewer rows than there are. Rows past the last group are zero in the result, and so are their
    gradients, whatever these rows, their weights and their cotangents hold, NaN included. jax.shard_map needs
    check_vma=False around it, as around every loop or kernel with a gradient of its own. Dtypes, memory, `dispatch`
    and errors: as in apply_experts.
    """
    _check_kernels("rows", rows, kernels)
    _check_shape("row_weights", row_weights, rows.shape[:1])
    _check_shape("sizes", sizes, kernels.gate.shape[:1])
    sizes = sizes.astype(jnp.int32)
    covered = jnp.arange(len(rows)) < sizes.sum()
    rows = jnp.where(covered[:, None], rows, 0)
    row_weights = jnp.where(covered, row_weights, 0)
    outputs = _by_dispatch(_resolve_here(dispatch, kernels), rows, row_weights, sizes, kernels)
    return jnp.where(covered[:, None], outputs, 0)


def apply_experts_to_segments(
    rows: Rows, row_weights: Float[Array, " rows"], segments: Segments, kernels: ExpertKernels, *, dispatch: str
) -> Rows:
    """row_weights_i down[e](silu(rows_i gate[e]) * (rows_i up[e])) for rows in segments of expert e.

    Rows of no segment are undefined in the result and in the gradients of rows and row_weights; nothing that they hold
    reaches anything else. The rest is as in apply_grouped_experts.
    """
    dispatch = _resolve_here(dispatch, kernels)
    if dispatch == "fused":
        from hybridnorm_jax.kernels.tpu_fused import fused

        return fused(rows, row_weights, segments, kernels)
    if dispatch == "grouped":
        from hybridnorm_jax.kernels.gpu_experts import gpu_experts

        return gpu_experts(rows, row_weights, segments, kernels)
    experts = expert_of_rows(segments, len(rows), nobody=len(kernels.gate))
    return apply_experts(rows, kernels, row_weights[:, None], experts[:, None], dispatch=dispatch, elsewhere=True)


def _by_dispatch(
    dispatch: str, rows: Rows, row_weights: Float[Array, " rows"], sizes: GroupSizes, kernels: ExpertKernels
) -> Rows:
    """apply_grouped_experts by a dispatch as resolve_dispatch returns it; rows past the last group are undefined."""
    match dispatch:
        case "dense":
            return _dense_grouped(rows, row_weights, sizes, kernels)
        case "blocked":
            return blocked(rows, row_weights, sizes, kernels)
        case "ragged":
            return experts_by_products(ragged_product, rows, row_weights, sizes, kernels)
        case "gmm":
            from hybridnorm_jax.kernels.tpu_gmm import gmm_product  # imports Pallas, which takes a while

            return experts_by_products(gmm_product, rows, row_weights, sizes, kernels)
        case "fused":
            from hybridnorm_jax.kernels.tpu_fused import fused

            return fused(rows, row_weights, segments_of_groups(sizes), kernels)
        case "grouped":
            from hybridnorm_jax.kernels.gpu_experts import gpu_experts

            return gpu_experts(rows, row_weights, segments_of_groups(sizes), kernels)


def _dense(
    x: Tokens, kernels: ExpertKernels, weights: Float[Array, "tokens k"], chosen: Int[Array, "tokens k"]
) -> Tokens:
    one_hot = chosen[..., None] == jnp.arange(len(kernels.gate))
    weights = jnp.where(one_hot, weights[..., None], 0).sum(1)
    gated = wide_einsum("td,edm->tem", x, kernels.gate).astype(x.dtype)
    upped = wide_einsum("td,edm->tem", x, kernels.up).astype(x.dtype)
    return wide_einsum("tem,emd->td", swiglu(gated, upped, weights, kernels.clamp), kernels.down).astype(x.dtype)


def _dense_grouped(rows: Rows, row_weights: Float[Array, " rows"], sizes: GroupSizes, kernels: ExpertKernels) -> Rows:
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    return _dense(rows, kernels, row_weights[:, None], expert[:, None])


def _resolve_here(dispatch: str, kernels: ExpertKernels) -> str:
    platform = jax.default_backend() if dispatch == "auto" else None
    _, embed, mlp = kernels.gate.shape
    return resolve_dispatch(
        dispatch,
        platform=platform,
        dtype=kernels.gate.dtype,
        size=ExpertSize(embed, mlp),
        clamped=kernels.clamp is not None,
    )


def _check_rank(name: str, array: Array, rank: int) -> None:
    if array.ndim != rank:
        raise ValueError(f"{name}: shape {array.shape} must have {rank} dimensions")


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape} must be {shape}")


def _check_kernels(name: str, x: Array, kernels: ExpertKernels) -> None:
    _check_rank(name, x, 2)
    _check_rank("gate", kernels.gate, 3)
    experts, _, mlp = kernels.gate.shape
    _check_shape("gate", kernels.gate, (experts, x.shape[1], mlp))
    _check_shape("up", kernels.up, kernels.gate.shape)
    _check_shape("down", kernels.down, (experts, mlp, x.shape[1]))
    for argument, kernel in {"gate": kernels.gate, "up": kernels.up, "down": kernels.down}.items():
        if kernel.dtype != x.dtype:
            raise ValueError(f"{argument}: dtype {kernel.dtype} must be that of {name}, {x.dtype}")
