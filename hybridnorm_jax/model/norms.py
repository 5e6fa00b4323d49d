"""The three norms as pure functions, and Norm, the Flax module over them.

Statistics are computed in at least float32, eps stands inside the root, and the functions' result has the dtype of x.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

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


class Norm(nn.Module, kw_only=True):
    """layer_norm, rms_norm or crms_norm with a learned scale and bias, in the place of flax.linen.LayerNorm or RMSNorm.

    Arguments, parameters and the dtype of the result are those of flax.linen, so `nn.LayerNorm(...)` and
    `hn.Norm(kind="layernorm", ...)`, or `nn.RMSNorm(...)` and `hn.Norm(...)`, read each other's checkpoints. The
    variance is the exact one, of use_fast_variance=False.

    Parameters: `scale` and `bias`, each where asked for, of shape (width,): the size of feature_axes.

    Attributes:
      kind: "rmsnorm", "layernorm" or "crmsnorm".
      epsilon: added to the variance, or mean square, inside the root.
      dtype: of the result; None: what x and the parameters promote to.
      param_dtype: of the parameters.
      use_scale, use_bias: whether the parameter exists; use_bias=None: as in flax.linen, for layernorm alone.
      scale_plus_one: what is multiplied by is 1 + scale, and `scale` starts at scale_init - 1 (Gemma, Nemotron).
      scale_init, bias_init: initializers.
      reduction_axes: the axes that statistics are taken over; the last one for crmsnorm.
      feature_axes: the axes that scale and bias belong to.
      axis_name, axis_index_groups, use_fast_variance, force_float32_reductions: another value is an error. Under
        jax.jit statistics are right however x is sharded.
      width: crmsnorm only: true length of the vector, see crms_norm.

    Raises:
      ValueError: an argument that this norm does not have, or an axis that x does not have; names it.
    """

    kind: str = "rmsnorm"
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    use_bias: bool | None = None
    scale_plus_one: bool = False
    scale_init: Callable[..., Array] = nn.initializers.ones
    bias_init: Callable[..., Array] = nn.initializers.zeros
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = False
    force_float32_reductions: bool = True
    width: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"], *, mask: None = None) -> Float[Array, "*batch width"]:
        """The normalized array. `mask` is there so that flax.linen's can be refused by name."""
        x = jnp.asarray(x)
        self._check(x.ndim, mask)
        use_bias = self.kind == "layernorm" if self.use_bias is None else self.use_bias
        scale = self._parameter("scale", self._scale_init, x) if self.use_scale else None
        bias = self._parameter("bias", self.bias_init, x) if use_bias else None
        dtype = self.dtype
        if dtype is None:
            present = [array for array in (x, scale, bias) if array is not None]
            dtype = jnp.result_type(*present)
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        if scale is not None and self.scale_plus_one:
            scale = plus_one(scale, x.dtype)
        match self.kind:
            case "crmsnorm":
                y = crms_norm(x, scale, bias, eps=self.epsilon, width=self.width)
            case "layernorm":
                y = layer_norm(x, scale, bias, eps=self.epsilon, axis=self._axes("reduction_axes", x.ndim))
            case _:
                y = rms_norm(x, scale, bias, eps=self.epsilon, axis=self._axes("reduction_axes", x.ndim))
        return y.astype(dtype)

    def _scale_init(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        start = self.scale_init(key, shape, dtype)
        return start - 1 if self.scale_plus_one else start

    def _parameter(self, name: str, init: Callable[..., Array], x: Array) -> Array:
        """The parameter, of the shape of feature_axes, shaped so that it broadcasts against x."""
        axes = self._axes("feature_axes", x.ndim)
        array: Array = self.param(name, init, tuple(x.shape[axis] for axis in axes), self.param_dtype)
        if axes == (x.ndim - 1,):
            return array
        return array.reshape([x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)])

    def _axes(self, name: str, ndim: int) -> tuple[int, ...]:
        """reduction_axes or feature_axes, each once, counted from the front, ascending."""
        given = getattr(self, name)
        axes = as_axes(given)
        for axis in axes:
            if not -ndim <= axis < ndim:
                right = f"x has {ndim} axes, from -{ndim} to {ndim - 1}" if ndim else "x is a scalar, without axes"
                raise ValueError(f"{name}={given}: {right}")
        return tuple(sorted({axis % ndim for axis in axes}))

    def _check(self, ndim: int, mask: object) -> None:
        if mask is not None:
            raise ValueError("mask: hn.Norm has mask=None only; set what does not count to zero yourself")
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.inexact):
            raise ValueError(f"dtype={jnp.dtype(self.dtype).name}: must be a floating-point dtype")
        if self.kind not in ("rmsnorm", "layernorm", "crmsnorm"):
            raise ValueError(f"kind={self.kind!r}: must be rmsnorm, layernorm or crmsnorm")
        if self.width is not None and self.kind != "crmsnorm":
            raise ValueError(f"width={self.width}: only for kind='crmsnorm', not for {self.kind!r}")
        if self.kind == "crmsnorm" and self._axes("reduction_axes", ndim) != (ndim - 1,):
            right = "kind='crmsnorm' knows the missing element of the last axis alone; must be -1"
            raise ValueError(f"reduction_axes={self.reduction_axes}: {right}")
        for name, only in ONLY_VALUES.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)}: hn.Norm has {name}={only} only")


# Arguments of flax.linen's norms that Norm takes so that it can refuse them by name.
ONLY_VALUES = {
    "axis_name": None,
    "axis_index_groups": None,
    "use_fast_variance": False,
    "force_float32_reductions": True,
}


def as_axes(axes: Axes) -> tuple[int, ...]:
    """One axis, of Python or NumPy, or several, as a tuple."""
    try:
        return (operator.index(axes),)  # type: ignore[arg-type]  # a sequence is what the exception is for
    except TypeError:
        return tuple(operator.index(axis) for axis in axes)  # type: ignore[union-attr]
