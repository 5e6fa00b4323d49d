"""A SwiGLU expert: its kernels, and its hidden layer."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.precision import wide_dtype

InputKernels = Float[Array, "experts embed mlp"]
OutputKernels = Float[Array, "experts mlp embed"]


class ExpertKernels(NamedTuple):
    """The kernels of all experts, or without the first axis those of one."""

    gate: InputKernels
    up: InputKernels
    down: OutputKernels

    def of(self, expert: Array) -> "ExpertKernels":
        """The kernels of one expert."""
        return ExpertKernels(gate=self.gate[expert], up=self.up[expert], down=self.down[expert])


def swiglu(
    gated: Float[Array, "*rows mlp"], upped: Float[Array, "*rows mlp"], weights: Float[Array, "*rows"]
) -> Float[Array, "*rows mlp"]:
    """weights * silu(gated) * upped, computed in float32 at least and returned in the dtype of `gated`."""
    wide = wide_dtype(gated.dtype)
    hidden = jax.nn.silu(gated.astype(wide)) * upped.astype(wide)
    return (weights.astype(wide)[..., None] * hidden).astype(gated.dtype)
