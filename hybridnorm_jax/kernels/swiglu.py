"""A SwiGLU expert: its kernels, and its hidden layer."""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.precision import wide_dtype

InputKernels = Float[Array, "experts embed mlp"]
OutputKernels = Float[Array, "experts mlp embed"]


class SwigluClamp(NamedTuple):
    """How far gate and up may go, and how steep the gate is, in swiglu_clamped; the defaults are those of gpt-oss.

    Attributes:
      limit: the gate is at most this, up lies between -this and this.
      alpha: the gate g becomes g * sigmoid(alpha * g).
    """

    limit: float = 7.0
    alpha: float = 1.702


@flax.struct.dataclass
class ExpertKernels:
    """The kernels of all experts, or without the first axis those of one.

    Attributes:
      gate, up, down: the kernels.
      clamp: None: the hidden layer is silu(gate) * up; otherwise it is clamped_swiglu.
    """

    gate: InputKernels
    up: InputKernels
    down: OutputKernels
    clamp: SwigluClamp | None = flax.struct.field(pytree_node=False, default=None)

    def of(self, expert: Array) -> "ExpertKernels":
        """The kernels of one expert."""
        return self.replace(gate=self.gate[expert], up=self.up[expert], down=self.down[expert])


def clamped_swiglu(
    gated: Float[Array, "*rows mlp"], upped: Float[Array, "*rows mlp"], clamp: SwigluClamp
) -> Float[Array, "*rows mlp"]:
    """g sigmoid(alpha g) (u + 1), where g = min(gated, limit), and u is upped between -limit and limit.

    Source: gpt-oss (2508.10925).
    """
    gated, upped = jnp.minimum(gated, clamp.limit), jnp.clip(upped, -clamp.limit, clamp.limit)
    return gated * jax.nn.sigmoid(clamp.alpha * gated) * (upped + 1)


def swiglu(
    gated: Float[Array, "*rows mlp"],
    upped: Float[Array, "*rows mlp"],
    weights: Float[Array, "*rows"],
    clamp: SwigluClamp | None = None,
) -> Float[Array, "*rows mlp"]:
    """weights * silu(gated) * upped, or weights * clamped_swiglu; in float32 at least, in the dtype of `gated`."""
    wide = wide_dtype(gated.dtype)
    g, u = gated.astype(wide), upped.astype(wide)
    hidden = jax.nn.silu(g) * u if clamp is None else clamped_swiglu(g, u, clamp)
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


def clamped_swiglu_gradients(
    gated: Float[Array, "rows mlp"],
    upped: Float[Array, "rows mlp"],
    weights: Float[Array, "rows 1"],
    d_weighted: Float[Array, "rows mlp"],
    clamp: SwigluClamp,
) -> SwigluGradients:
    """As swiglu_gradients, of rows w h, h = clamped_swiglu(g, u).

    Where g and u are not cut off, du = dh g s and dg = dh (u + 1) s (1 + alpha g (1 - s)), s = sigmoid(alpha g); where
    one is, its gradient is 0.
    """
    hidden, pull_back = jax.vjp(lambda gated, upped: clamped_swiglu(gated, upped, clamp), gated, upped)
    d_gated, d_upped = pull_back(weights * d_weighted)
    return SwigluGradients(
        hidden=weights * hidden,
        gated=d_gated,
        upped=d_upped,
        weights=(d_weighted * hidden).sum(1, keepdims=True),
    )
