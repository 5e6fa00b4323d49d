"""Norm, the Flax module over the norms of norm_functions.py."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hybridnorm_jax.errors import did_you_mean
from hybridnorm_jax.model.norm_functions import Axes, plus_one
from hybridnorm_jax.model.norm_kinds import NORM_KINDS, WIDTH, NormKind, NormParameter


class Norm(nn.Module, kw_only=True):
    """A norm of hn.NORM_KINDS with a learned scale and bias, in the place of flax.linen.LayerNorm or RMSNorm.

    Arguments, parameters and the dtype of the result are those of flax.linen, so `nn.LayerNorm(...)` and
    `hn.Norm(kind="layernorm", ...)`, or `nn.RMSNorm(...)` and `hn.Norm(...)`, read each other's checkpoints. The
    variance is the exact one, of use_fast_variance=False.

    Parameters: `scale` and `bias`, each where asked for, of shape (width,): the size of feature_axes; and those that
    the kind has besides, such as `alpha` (1,) of "dyt".

    Attributes:
      kind: a name in hn.NORM_KINDS, such as "rmsnorm", "layernorm", "crmsnorm" or "dyt".
      epsilon: added to the variance, or mean square, inside the root, where the kind has one.
      dtype: of the result; None: what x and the parameters promote to.
      param_dtype: of the parameters.
      use_scale, use_bias: whether the parameter exists; use_bias=None: as the kind usually has it, in
        flax.linen layernorm alone.
      scale_plus_one: what is multiplied by is 1 + scale, and `scale` starts at scale_init - 1 (Gemma, Nemotron).
      scale_init, bias_init: initializers.
      starts: what parameters that the kind has besides start at, in the place of its own; by their names.
      reduction_axes: the axes that statistics are taken over; the last one where the kind knows no other.
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
    starts: Mapping[str, float] | None = None
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
        kind = NORM_KINDS[self.kind]
        use_bias = kind.usual_bias if self.use_bias is None else self.use_bias
        scale = self._parameter("scale", self._scale_init, x) if self.use_scale else None
        bias = self._parameter("bias", self.bias_init, x) if use_bias else None
        own = {parameter.name: self._own(parameter, x) for parameter in kind.parameters}
        dtype = self.dtype
        if dtype is None:
            present = [array for array in (x, scale, bias, *own.values()) if array is not None]
            dtype = jnp.result_type(*present)
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        if scale is not None and self.scale_plus_one:
            scale = plus_one(scale, x.dtype)
        y = kind.callable(x, scale, bias, **own, **self._settings(kind, x.ndim))
        return y.astype(dtype)

    def _settings(self, kind: NormKind, ndim: int) -> dict[str, Any]:
        """The settings that the kind's function takes."""
        settings = {"eps": self.epsilon, "axis": self._axes("reduction_axes", ndim), "width": self.width}
        return {name: value for name, value in settings.items() if name in kind.settings}

    def _own(self, parameter: NormParameter, x: Array) -> Array:
        """A parameter that the kind has besides scale and bias."""
        start = (self.starts or {}).get(parameter.name, parameter.start)
        if start is None:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        else:
            init = nn.initializers.constant(start)
        if parameter.shape == (WIDTH,):
            return self._parameter(parameter.name, init, x)
        axes = self._axes("feature_axes", x.ndim)
        if WIDTH in parameter.shape and axes != (x.ndim - 1,):
            right = f"kind={self.kind!r} has matrices, which belong to the last axis alone; must be -1"
            raise ValueError(f"feature_axes={self.feature_axes}: {right}")
        array: Array = self.param(parameter.name, init, parameter.sizes(x.shape[-1]), self.param_dtype)
        return array

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
        if self.kind not in NORM_KINDS:
            raise ValueError(f"kind={self.kind!r}: not known{did_you_mean(self.kind, NORM_KINDS)}")
        kind = NORM_KINDS[self.kind]
        if self.width is not None and "width" not in kind.settings:
            raise ValueError(f"width={self.width}: kind={self.kind!r} has none; only for kind='crmsnorm'")
        if "axis" not in kind.settings and self._axes("reduction_axes", ndim) != (ndim - 1,):
            right = f"kind={self.kind!r} knows the last axis alone; must be -1"
            raise ValueError(f"reduction_axes={self.reduction_axes}: {right}")
        for name in self.starts or {}:
            if name not in kind.parameter_names:
                raise ValueError(f"starts: kind={self.kind!r} has no parameter {name!r}")
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
