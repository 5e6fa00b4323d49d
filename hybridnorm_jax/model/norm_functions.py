"""Norms as pure functions on arrays; norm_kinds.py lists those that a model can have.

Everything is computed in at least float32, eps stands inside the root, and the functions' result has the dtype of x.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import ConfigError, first_line

Axes = int | Sequence[int]


def _wide(x: Array) -> Array:
    """x in the dtype of the statistics: float32 at least, so that float64 stays float64."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"norms need a floating-point array, not {x.dtype}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def plus_one(scale: Float[Array, "*scale"], dtype: Any) -> Float[Array, "*scale"]:
    """1 + scale in float32 at least: what norms that store their scale so multiply an array of this dtype by."""
    return 1 + scale.astype(jnp.promote_types(dtype, jnp.float32))


def _affine(normalized: Array, scale: Array | None, bias: Array | None, dtype: Any) -> Array:
    if scale is not None:
        normalized = normalized * scale.astype(normalized.dtype)
    if bias is not None:
        normalized = normalized + bias.astype(normalized.dtype)
    return normalized.astype(dtype)


def unit(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """x / |x|, the Euclidean length taken over the last axis, without eps; a vector of zeros stays one.

    Source: nGPT (2410.01131), `Norm` of its section 2.
    """
    wide = _wide(x)
    square = jnp.square(wide).sum(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.where(square == 0, 1, square))).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    eps: float = 1e-5,
    axis: Axes = -1,
) -> Float[Array, "*batch width"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias, mean and variance taken over `axis`.

    The variance takes a second pass, over deviations whose own mean is subtracted again: with a mean of a million
    deviations the rounding of the first mean would otherwise enter it.

    Args:
      scale, bias: of any shape that broadcasts against x; vectors belong to its last axis.
      axis: one axis or several.

    Source: LayerNorm as written in Pre-RMSNorm (2305.14858).
    """
    wide = _wide(x)
    centred = wide - wide.mean(axis, keepdims=True)
    centred = centred - centred.mean(axis, keepdims=True)
    variance = jnp.square(centred).mean(axis, keepdims=True)
    return _affine(centred * jax.lax.rsqrt(variance + eps), scale, bias, x.dtype)


def rms_norm(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    eps: float = 1e-5,
    axis: Axes = -1,
) -> Float[Array, "*batch width"]:
    """x / sqrt(mean(x^2) + eps) * scale + bias, the mean taken over `axis`.

    Args:
      scale, bias: of any shape that broadcasts against x; vectors belong to its last axis.
      axis: one axis or several.

    Source: RMSNorm as written in Pre-RMSNorm (2305.14858).
    """
    wide = _wide(x)
    mean_square = jnp.square(wide).mean(axis, keepdims=True)
    return _affine(wide * jax.lax.rsqrt(mean_square + eps), scale, bias, x.dtype)


def crms_norm(
    x: Float[Array, "*batch stored"],
    scale: Float[Array, " stored"] | None = None,
    bias: Float[Array, " stored"] | None = None,
    *,
    eps: float = 1e-5,
    width: int | None = None,
) -> Float[Array, "*batch stored"]:
    """x / sqrt((sum x_i^2 + (sum x_i)^2) / width + eps) * scale + bias over the last axis.

    x holds all but the last element of a zero-mean vector of length `width`; the missing one is -sum x_i. The result
    is RMSNorm of the whole vector, without its last element.

    Args:
      width: length of the whole vector; by default the stored length + 1. Give it when x is padded with zeros.

    Source: CRMSNorm, Pre-RMSNorm (2305.14858), eq. 5.
    """
    wide = _wide(x)
    stored = x.shape[-1]
    if width is not None and not 1 <= width <= stored + 1:
        raise ValueError(f"width={width}: x has {stored} channels, so it must be in [1, {stored + 1}]")
    width = stored + 1 if width is None else width
    total = jnp.square(wide).sum(-1, keepdims=True) + jnp.square(wide.sum(-1, keepdims=True))
    return _affine(wide * jax.lax.rsqrt(total / width + eps), scale, bias, x.dtype)


def dyt(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    alpha: Float[Array, "1"],
) -> Float[Array, "*batch width"]:
    """tanh(alpha * x) * scale + bias: no statistics, so every number is normalized by itself.

    Source: DyT (2503.10622).
    """
    wide = _wide(x)
    return _affine(jnp.tanh(alpha.astype(wide.dtype) * wide), scale, bias, x.dtype)


def derf(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    alpha: Float[Array, "1"],
    shift: Float[Array, "1"],
) -> Float[Array, "*batch width"]:
    """erf(alpha * x + shift) * scale + bias, erf the error function.

    Source: Derf (2512.10938).
    """
    wide = _wide(x)
    inside = alpha.astype(wide.dtype) * wide + shift.astype(wide.dtype)
    return _affine(jax.lax.erf(inside), scale, bias, x.dtype)


def bhyt(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    lam: Float[Array, "1"],
    eps: float = 1e-6,
    axis: Axes = -1,
) -> Float[Array, "*batch width"]:
    """tanh(0.1 * lam * x / sqrt(mean(x^2) + eps)) * scale + bias, the mean taken over `axis`.

    Source: BHyT as its authors' code has it, github.com/MLAI-Yonsei/BHyT.
    """
    wide = _wide(x)
    normalized = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis, keepdims=True) + eps)
    return _affine(jnp.tanh(0.1 * lam.astype(wide.dtype) * normalized), scale, bias, x.dtype)


def gated_norm(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    down: Float[Array, "width rank"],
    up: Float[Array, "rank width"],
    eps: float = 1e-5,
) -> Float[Array, "*batch width"]:
    """y * sigmoid(silu(y @ down) @ up), where y = rms_norm(x, scale, bias).

    Source: GatedNorm (2601.22966), as others state it; see its row in norm_kinds.py.
    """
    y = rms_norm(_wide(x), scale, bias, eps=eps)
    # By default TPUs round the factors of a float32 product to bfloat16, and GPUs may to TF32.
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    gate = product(jax.nn.silu(product(y, down.astype(y.dtype))), up.astype(y.dtype))
    return (y * jax.nn.sigmoid(gate)).astype(x.dtype)


def plugin_norm(
    name: str,
    function: Callable[..., Any],
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    /,  # so that a parameter may have any name, such as `name`
    **parameters: Array,
) -> Float[Array, "*batch width"]:
    """function(x, **parameters) * scale + bias, for a function of the user's own.

    It gets x and its parameters in float32 at least, and must return an array like x.

    Args:
      name: of the kind, for messages.

    Raises:
      ConfigError: the function fails, or returns another thing.
    """
    wide = _wide(x)
    where = f"the norm kind {shortened(name)}: its function, called with {wide.dtype}{list(wide.shape)},"
    try:
        y = function(wide, **{key: array.astype(wide.dtype) for key, array in parameters.items()})
    except Exception as error:
        raise ConfigError(f"{where} raises {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(y, jax.Array):
        raise ConfigError(f"{where} must return an array, not {type(y).__name__}")
    if (y.shape, y.dtype) != (wide.shape, wide.dtype):
        raise ConfigError(f"{where} must return an array of this dtype and shape, not {y.dtype}{list(y.shape)}")
    return _affine(y, scale, bias, x.dtype)


def check_plugin_norm(name: str, function: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Call a function of the user's own with shapes alone, so that a wrong one is refused where it is registered.

    Args:
      shapes: of its parameters, for an x of 8 channels.

    Raises:
      ConfigError: see plugin_norm.
    """

    def of(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def called(x: Array, parameters: dict[str, Array]) -> Array:
        return plugin_norm(name, function, x, **parameters)

    jax.eval_shape(called, of((2, 3, 8)), {key: of(shape) for key, shape in shapes.items()})


def zero_mean_defect(x: Float[Array, "*batch width"]) -> Float[Array, ""]:
    """How far vectors are from zero mean, which RMSNorm needs to be equal to LayerNorm; 0 where they have it.

        max |sum x| / (sqrt(width) * rms(x))

    About 1 for a random vector, whatever its length, and about one rounding error for a centred one.
    """
    wide = _wide(x)
    rms = jnp.sqrt(jnp.square(wide).mean(-1))
    return _largest_in_rms(jnp.abs(wide.sum(-1)) / x.shape[-1] ** 0.5, rms)


def padding_defect(x: Float[Array, "*batch stored"], width: int) -> Float[Array, ""]:
    """How far stored vectors are from being zero behind their width - 1 elements, which crms_norm needs; 0: they are.

        max |x_i| / rms(x), i >= width - 1

    Args:
      width: true length of the vectors, see crms_norm.
    """
    wide = _wide(x)
    rms = jnp.sqrt(jnp.square(wide).mean(-1))
    return _largest_in_rms(jnp.abs(wide[..., width - 1 :]).max(-1, initial=0.0), rms)


def _largest_in_rms(size: Float[Array, "*batch"], rms: Float[Array, "*batch"]) -> Float[Array, ""]:
    # NaN is no zero: it stays NaN.
    return jnp.max(jnp.where(size == 0, 0, size / jnp.where(rms > 0, rms, 1)))
