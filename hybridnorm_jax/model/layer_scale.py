"""Learned numbers that multiply a stream: what a branch adds, or a residual; and numbers stored in another unit."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.precision import widened


class LayerScale(nn.Module):
    """scale * x, a learned number for each channel, or one for all of them.

    LayerScale of CaiT (2103.17239), section 2, has one for each channel; ReZero (2003.04887) and SkipInit (2002.10444)
    have one for all.

    Parameters: `scale` (embed,), or (1,) with is_scalar.

    Attributes:
      param_dtype: of the parameter.
      is_scalar: one number for all channels.
      scale_init: initializer.
    """

    param_dtype: Any
    is_scalar: bool = False
    scale_init: Callable[..., Array] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """The product, multiplied in float32 at least and rounded once to the dtype of x."""
        shape = (1,) if self.is_scalar else x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        wide = widened(x)
        return (scale.astype(wide.dtype) * wide).astype(x.dtype)


class StoredScale(nn.Module):
    """start * scale / stored: learned numbers that begin at `start`, stored as a `scale` that begins at `stored`.

    Adam moves every parameter by about its learning rate. Numbers that are stored larger, or smaller, than they count
    so move slower, or faster. nGPT (2410.01131), section 2.5.

    Parameters: `scale`, of the shape that it is called with.

    Attributes:
      start: what the numbers begin at.
      stored: what the parameter begins at.
      param_dtype: of the parameter.
    """

    start: float
    stored: float
    param_dtype: Any

    @nn.compact
    def __call__(self, *shape: int) -> Array:
        """The numbers, in float32 at least."""
        scale: Array = self.param("scale", nn.initializers.constant(self.stored), shape, self.param_dtype)
        return widened(scale) * (self.start / self.stored)
