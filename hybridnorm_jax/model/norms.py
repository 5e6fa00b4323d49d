"""The three norms as pure functions, and Norm, the Flax module over them.

Statistics are computed in at least float32, eps stands inside the root, and the result has the dtype of x.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def _wide(x: Array) -> Array:
    """x in the dtype of the statistics: float32 at least, so that float64 stays float64."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"norms need a floating-point array, not {x.dtype}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _affine(normalized: Array, scale: Array | None, bias: Array | None, dtype: Any) -> Array:
    if scale is not None:
        normalized = normalized * scale.astype(normalized.dtype)
    if bias is not None:
        normalized = normalized + bias.astype(normalized.dtype)
    return normalized.astype(dtype)


def layer_norm(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "*batch width"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis.

    The variance takes a second pass, over deviations whose own mean is subtracted again: with a mean of a million
    deviations the rounding of the first mean would otherwise enter it.

    Source: LayerNorm as written in Pre-RMSNorm (2305.14858).
    """
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdims=True)
    centred = centred - centred.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return _affine(centred * jax.lax.rsqrt(variance + eps), scale, bias, x.dtype)


def rms_norm(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"] | None = None,
    bias: Float[Array, " width"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "*batch width"]:
    """x / sqrt(mean(x^2) + eps) * scale + bias over the last axis.

    Source: RMSNorm as written in Pre-RMSNorm (2305.14858).
    """
    wide = _wide(x)
    mean_square = jnp.square(wide).mean(-1, keepdims=True)
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
    width = x.shape[-1] + 1 if width is None else width
    total = jnp.square(wide).sum(-1, keepdims=True) + jnp.square(wide.sum(-1, keepdims=True))
    return _affine(wide * jax.lax.rsqrt(total / width + eps), scale, bias, x.dtype)


def zero_mean_defect(x: Float[Array, "*batch stored"], width: int | None = None) -> Float[Array, ""]:
    """How far x is from what RMSNorm or CRMSNorm takes for granted where it replaces LayerNorm; 0 where it holds.

        max |sum x| / (sqrt(len) * rms(x))            the whole vector has zero mean (width=None)
        max |x_i|, i >= width - 1, / rms(x)           a stored one has zeros after its width - 1 elements

    The first is about 1 for a random vector, whatever its length, and about one rounding error for a centred one.
    """
    wide = _wide(x)
    rms = jnp.sqrt(jnp.square(wide).mean(-1))
    if width is None:
        size = jnp.abs(wide.sum(-1)) / x.shape[-1] ** 0.5
    else:
        size = jnp.abs(wide[..., width - 1 :]).max(-1, initial=0.0)
    # NaN is no zero: it stays NaN.
    return jnp.max(jnp.where(size == 0, 0, size / jnp.where(rms > 0, rms, 1)))


class Norm(nn.Module):
    """layer_norm, rms_norm or crms_norm over the last axis, with a learned scale and bias.

    Parameters: `scale` (width,) and `bias` (width,), each where asked for.

    Attributes:
      kind: "rmsnorm", "layernorm" or "crmsnorm".
      eps: added to the mean square inside the root.
      use_scale, use_bias: whether the parameter exists.
      scale_init: initial value of the scale.
      width: crmsnorm only: true length of the vector, see crms_norm.
      param_dtype: dtype of the parameters.
    """

    kind: str = "rmsnorm"
    eps: float = 1e-5
    use_scale: bool = True
    use_bias: bool = False
    scale_init: float = 1.0
    width: int | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        shape, dtype = (x.shape[-1],), self.param_dtype
        scale = self.param("scale", nn.initializers.constant(self.scale_init), shape, dtype) if self.use_scale else None
        bias = self.param("bias", nn.initializers.zeros, shape, dtype) if self.use_bias else None
        if self.kind == "crmsnorm":
            return crms_norm(x, scale, bias, eps=self.eps, width=self.width)
        if self.kind not in ("rmsnorm", "layernorm") or self.width is not None:
            raise ValueError(
                f"kind={self.kind!r}, width={self.width}: must be rmsnorm, layernorm, or crmsnorm with a width"
            )
        return (rms_norm if self.kind == "rmsnorm" else layer_norm)(x, scale, bias, eps=self.eps)
