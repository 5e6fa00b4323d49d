"""The feed-forward branch: one hidden layer with an activation, or with a gate (a GLU)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.dense_products import dot_general
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.kernels.swiglu import SwigluClamp, clamped_swiglu
from hybridnorm_jax.model.config_feed_forward import ACTIVATIONS, CLAMPED, GATED
from hybridnorm_jax.model.initializers import truncated_normal
from hybridnorm_jax.model.input_checks import check_at_least_one
from hybridnorm_jax.model.layer_scale import StoredScale
from hybridnorm_jax.model.norms import Norm

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
    their `bias` where asked for; of the norms that there are `gate_norm`, `up_norm` and `hidden_norm`, with `scale` and
    `bias` (mlp,); of sphere `gate_scale/scale` and `up_scale/scale` (mlp,).

    Attributes:
      mlp_dim: width of the hidden layer.
      activation: one of those above, or "gelu" (exact), "gelu_tanh", "gelu_quick" (x sigmoid(1.702 x)), "relu",
        "relu_squared" or "silu".
      use_bias: biases on gate and up, and on down unless use_output_bias says otherwise.
      use_output_bias: a bias on down; None: use_bias.
      clamp: of swiglu_clamped; nothing else reads it.
      gate_norm, up_norm: norms of gate(x), and of up(x). SimpleNorm (2602.01212).
      hidden_norm: a norm of what down reads. Sub-LN (2210.06423), NormFormer (2110.09456).
      sphere: gate(x) and up(x) are times sqrt(embed) and a learned number for each hidden channel, which starts at 1.
        nGPT (2410.01131), section 2.4.
      norm, norm_starts, norm_epsilon, norm_scale, norm_bias, norm_scale_plus_one: Norm's kind, starts, epsilon,
        use_scale, use_bias and scale_plus_one for all of these; they are over the hidden width.
      dtype, param_dtype: of the computation and of the parameters.
      input_init, up_init, output_init: initializers of gate, of up (None: input_init), and of down.
    """

    mlp_dim: int
    activation: str = "swiglu"
    use_bias: bool = False
    use_output_bias: bool | None = None
    clamp: SwigluClamp = SwigluClamp()
    gate_norm: bool = False
    up_norm: bool = False
    hidden_norm: bool = False
    sphere: bool = False
    norm: str = "rmsnorm"
    norm_starts: Mapping[str, float] | None = None
    norm_epsilon: float = 1e-5
    norm_scale: bool = True
    norm_bias: bool = False
    norm_scale_plus_one: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    input_init: Callable[..., Array] = truncated_normal(0.02)
    up_init: Callable[..., Array] | None = None
    output_init: Callable[..., Array] = truncated_normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
        check_at_least_one("mlp_dim", self.mlp_dim)
        if self.gate_norm and self.activation not in GATED:
            raise ValueError(f"gate_norm=True: activation={self.activation!r} has no gate")
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype, dot_general=dot_general)
        read = partial(dense, self.mlp_dim, use_bias=self.use_bias)
        up_init = self.input_init if self.up_init is None else self.up_init
        up = self._normalize("up_norm", self._scaled("up_scale", read(name="up", kernel_init=up_init)(x), x.shape[-1]))
        if self.activation in GATED:
            gate = self._scaled("gate_scale", read(name="gate", kernel_init=self.input_init)(x), x.shape[-1])
            gate = self._normalize("gate_norm", gate)
        if self.activation == CLAMPED:
            hidden = clamped_swiglu(gate, up, self.clamp)
        else:
            function = FUNCTIONS[self.activation]
            hidden = function(gate) * up if self.activation in GATED else function(up)
        hidden = self._normalize("hidden_norm", hidden)
        use_output_bias = self.use_bias if self.use_output_bias is None else self.use_output_bias
        return dense(x.shape[-1], use_bias=use_output_bias, kernel_init=self.output_init, name="down")(hidden)

    def _scaled(self, name: str, hidden: Hidden, embed: int) -> Hidden:
        """hidden as it is, with sphere times sqrt(embed) and its learned numbers."""
        if not self.sphere:
            return hidden
        scale = StoredScale(1.0, 1.0, self.param_dtype, name=name)(self.mlp_dim) * math.sqrt(embed)
        return (scale * widened(hidden)).astype(hidden.dtype)

    def _normalize(self, name: str, hidden: Hidden) -> Hidden:
        """The norm of this name where there is one, otherwise hidden as it is."""
        if not getattr(self, name):
            return hidden
        norm = Norm(
            kind=self.norm,
            epsilon=self.norm_epsilon,
            use_scale=self.norm_scale,
            use_bias=self.norm_bias,
            scale_plus_one=self.norm_scale_plus_one,
            starts=self.norm_starts,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )
        return norm(hidden)
