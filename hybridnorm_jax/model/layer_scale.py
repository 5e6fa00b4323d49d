"""What a branch adds, or a residual, times learned numbers: one for each channel (LayerScale), or one for all."""

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
