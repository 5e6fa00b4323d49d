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


class SwigluGradients(NamedTuple):
    """What the backward pass of an expert's hidden layer makes of rows.

    Attributes:
      hidden: the weighted hidden layer once more, which the gradient of `down` needs.
      gated, upped: gradients.
      weights: gradient, a column.
    """

    hidden: Float[Array, "rows mlp"]
    gated: Float[Array, "rows mlp"]
    upped: Float[Array, "rows mlp"]
    weights: Float[Array, "rows 1"]


def swiglu_gradients(
    gated: Float[Array, "rows mlp"],
    upped: Float[Array, "rows mlp"],
    weights: Float[Array, "rows 1"],
    d_weighted: Float[Array, "rows mlp"],
) -> SwigluGradients:
    """The gradients of rows w h, h = silu(g) u, given those of w h.

    With dh = w dwh they are du = dh silu(g), dg = dh u silu'(g), and dw, the sum of dwh h over the hidden channels,
    where silu(g) = g s and silu'(g) = s (1 + g (1 - s)), s = sigmoid(g). All arguments and results are of one dtype.
    """
    sigmoid = jax.nn.sigmoid(gated)
    hidden = gated * sigmoid * upped
    d_hidden = weights * d_weighted
    return SwigluGradients(
        hidden=weights * hidden,
        gated=d_hidden * upped * sigmoid * (1 + gated * (1 - sigmoid)),
        upped=d_hidden * gated * sigmoid,
        weights=(d_weighted * hidden).sum(1, keepdims=True),
    )
