"""LayerScale: what a branch adds, times a learned number for each channel."""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.precision import widened


class LayerScale(nn.Module):
    """scale * x, a learned number for each channel, which starts at 1. CaiT (2103.17239), section 2.

    Parameters: `scale` (embed,).

    Attributes:
      param_dtype: of the parameter.
    """

    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """The product, multiplied in float32 at least and rounded once to the dtype of x."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        wide = widened(x)
        return (scale.astype(wide.dtype) * wide).astype(x.dtype)
