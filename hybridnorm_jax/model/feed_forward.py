"""The feed-forward branch: SwiGLU, or one hidden layer with GELU or ReLU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.dense_products import dot_general
from hybridnorm_jax.model.initializers import truncated_normal
from hybridnorm_jax.model.input_checks import check_at_least_one

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) for swiglu, down(activation(up(x))) otherwise.

    Parameters: `gate/kernel` (embed, mlp; swiglu only), `up/kernel` (embed, mlp), `down/kernel` (mlp, embed), and
    their `bias` where asked for. SwiGLU: 2002.05202.

    Attributes:
      mlp_dim: width of the hidden layer.
      activation: "swiglu", "gelu" (exact), "gelu_tanh" or "relu".
      use_bias: biases on all projections.
      dtype, param_dtype: of the computation and of the parameters.
      input_init, output_init: initializers of gate and up, and of down.
    """

    mlp_dim: int
    activation: str = "swiglu"
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    input_init: Callable[..., Array] = truncated_normal(0.02)
    output_init: Callable[..., Array] = truncated_normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        if self.activation not in ("swiglu", *ACTIVATIONS):
            raise ValueError(f"activation={self.activation!r} must be swiglu or one of {', '.join(ACTIVATIONS)}")
        check_at_least_one("mlp_dim", self.mlp_dim)
        dense = partial(
            nn.Dense,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=dot_general,
        )
        up = dense(self.mlp_dim, kernel_init=self.input_init, name="up")(x)
        if self.activation == "swiglu":
            gate = dense(self.mlp_dim, kernel_init=self.input_init, name="gate")(x)
            hidden = jax.nn.silu(gate) * up
        else:
            hidden = ACTIVATIONS[self.activation](up)
        return dense(x.shape[-1], kernel_init=self.output_init, name="down")(hidden)
