"""The feed-forward branch: one hidden layer with an activation, or with a gate (a GLU)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.dense_products import dot_general
from hybridnorm_jax.kernels.swiglu import SwigluClamp, clamped_swiglu
from hybridnorm_jax.model.config_feed_forward import ACTIVATIONS, CLAMPED, GATED
from hybridnorm_jax.model.initializers import truncated_normal
from hybridnorm_jax.model.input_checks import check_at_least_one

Hidden = Float[Array, "batch seq mlp"]


def gelu_quick(x: Hidden) -> Hidden:
    """x * sigmoid(1.702 x), GELU as CLIP has it (1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def relu_squared(x: Hidden) -> Hidden:
    """max(x, 0)^2. Primer (2109.08668)."""
    return jnp.square(jax.nn.relu(x))


_gelu, _gelu_tanh = partial(jax.nn.gelu, approximate=False), partial(jax.nn.gelu, approximate=True)
# The function of every activation but the clamped one. config_feed_forward.GATED says which of them are of a gate.
FUNCTIONS: dict[str, Callable[[Hidden], Hidden]] = {
    "swiglu": jax.nn.silu,
    "geglu": _gelu,
    "geglu_tanh": _gelu_tanh,
    "geglu_quick": gelu_quick,
    "reglu": jax.nn.relu,
    "reglu_squared": relu_squared,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": gelu_quick,
    "relu": jax.nn.relu,
    "relu_squared": relu_squared,
    "silu": jax.nn.silu,
}


class FeedForward(nn.Module):
    """down(function(gate(x)) * up(x)) for gated activations, down(function(up(x))) for the others.

    Gated are swiglu (silu), geglu, geglu_tanh, geglu_quick (the GELUs), reglu (ReLU), reglu_squared (ReLU squared), and
    swiglu_clamped, of which kernels.swiglu.clamped_swiglu has the formula. GLUs: 2002.05202.

    Parameters: `gate/kernel` (embed, mlp; gated only), `up/kernel` (embed, mlp), `down/kernel` (mlp, embed), and
    their `bias` where asked for.

    Attributes:
      mlp_dim: width of the hidden layer.
      activation: one of those above, or "gelu" (exact), "gelu_tanh", "gelu_quick" (x sigmoid(1.702 x)), "relu",
        "relu_squared" or "silu".
      use_bias: biases on gate and up, and on down unless use_output_bias says otherwise.
      use_output_bias: a bias on down; None: use_bias.
      clamp: of swiglu_clamped; nothing else reads it.
      dtype, param_dtype: of the computation and of the parameters.
      input_init, output_init: initializers of gate and up, and of down.
    """

    mlp_dim: int
    activation: str = "swiglu"
    use_bias: bool = False
    use_output_bias: bool | None = None
    clamp: SwigluClamp = SwigluClamp()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    input_init: Callable[..., Array] = truncated_normal(0.02)
    output_init: Callable[..., Array] = truncated_normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
        check_at_least_one("mlp_dim", self.mlp_dim)
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype, dot_general=dot_general)
        read = partial(dense, self.mlp_dim, use_bias=self.use_bias, kernel_init=self.input_init)
        up = read(name="up")(x)
        if self.activation == CLAMPED:
            hidden = clamped_swiglu(read(name="gate")(x), up, self.clamp)
        else:
            function = FUNCTIONS[self.activation]
            hidden = function(read(name="gate")(x)) * up if self.activation in GATED else function(up)
        use_output_bias = self.use_bias if self.use_output_bias is None else self.use_output_bias
        return dense(x.shape[-1], use_bias=use_output_bias, kernel_init=self.output_init, name="down")(hidden)
