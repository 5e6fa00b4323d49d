"""The mixture-of-experts branch: a router sends every token to k of the experts, and none is dropped."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.kernels.backend_names import EXPERT_DISPATCHES
from hybridnorm_jax.kernels.dense_products import rows_product
from hybridnorm_jax.kernels.split_experts import apply_experts_on_mesh
from hybridnorm_jax.kernels.swiglu import ExpertKernels, SwigluClamp
from hybridnorm_jax.model.config_feed_forward import CLAMPED, EXPERT_ACTIVATIONS
from hybridnorm_jax.model.feed_forward import FeedForward
from hybridnorm_jax.model.initializers import truncated_normal
from hybridnorm_jax.model.input_checks import check_at_least_one, check_stream
from hybridnorm_jax.model.watched_streams import CHOSEN, ROUTER


@flax.struct.dataclass
class RouterStatistics:
    """What one layer's router did with a batch of tokens; means over the tokens, in float32 at least.

    Attributes:
      balance_loss: num_experts * sum_e fraction_e * mean(p_e), p the router's softmax; 1 where either is uniform. The
        gradient flows through p. Switch Transformers (2101.03961), eq. 4, with the k choices of a token counted each;
        transformers' OLMoE has k times this.
      z_loss: mean(log(sum_e exp(logit_e))^2). ST-MoE (2202.08906), eq. 5.
      entropy: mean(-sum_e p_e log p_e), in nats; log(num_experts) at most.
      fraction: of all tokens * k choices, how many fell on each expert; the sum is 1.
    """

    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    entropy: Float[Array, ""]
    fraction: Float[Array, " experts"]


def choose_experts(
    logits: Float[Array, "batch seq experts"],
    k: int,
    *,
    normalize: bool = False,
    balance_bias: Float[Array, " experts"] | None = None,
) -> tuple[Float[Array, "batch seq k"], Int[Array, "batch seq k"]]:
    """(weights, chosen): the k largest of p = softmax(logits) and whose they are, the largest first.

    Args:
      normalize: divide a token's k weights by their sum.
      balance_bias: added to p for the choice alone, not to the weights (2408.15664).
    """
    p = jax.nn.softmax(logits)
    scores = p if balance_bias is None else p + jax.lax.stop_gradient(balance_bias).astype(p.dtype)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
    if normalize:  # p / sum of p over the chosen, which a balance bias may choose although p is 0 in this dtype
        return jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1)), chosen
    return jnp.take_along_axis(p, chosen, axis=-1), chosen


def router_statistics(logits: Float[Array, "batch seq experts"], chosen: Int[Array, "batch seq k"]) -> RouterStatistics:
    """The statistics of one router's logits and choices."""
    experts = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    p = jax.nn.softmax(logits)
    fraction = (chosen[..., None] == jnp.arange(experts)).mean((0, 1, 2), dtype=logits.dtype)
    return RouterStatistics(
        balance_loss=experts * jnp.vdot(fraction, p.mean((0, 1))),
        z_loss=jnp.square(log_z).mean(),
        entropy=(log_z - (p * logits).sum(-1)).mean(),
        fraction=fraction,
    )


class ExpertProjection(nn.Module):
    """The stacked kernels of one projection of all experts.

    Parameters: `kernel` (experts, inputs, outputs), `bias` (experts, outputs) where asked for.
    """

    shape: tuple[int, int, int]
    use_bias: bool
    dtype: Any
    param_dtype: Any
    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "experts inputs outputs"], Float[Array, "experts outputs"] | None]:
        """(kernel, bias or None) in the compute dtype."""
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype).astype(self.dtype)
        if not self.use_bias:
            return kernel, None
        shape = (self.shape[0], self.shape[2])
        return kernel, self.param("bias", nn.initializers.zeros, shape, self.param_dtype).astype(self.dtype)


class MoE(nn.Module):
    """y = sum over the k chosen experts of weight_e * down_e(silu(gate_e(x)) * up_e(x)), plus the shared experts.

    The router is softmax(x @ kernel + bias) in float32 at least, its k largest entries are the weights, with
    normalize_weights the softmax of the k largest logits, which is the same over their sum. Dropless: every
    token reaches all its experts, however unevenly they are chosen. OLMoE (2409.02060), eqs. 1 and 2.

    Parameters: `router/kernel` (embed, experts), `expert_gate/kernel` and `expert_up/kernel` (experts, embed, mlp),
    `expert_down/kernel` (experts, mlp, embed), their `bias` where asked for, `balance_bias` (experts,) where asked for,
    of the shared experts `shared/{gate, up, down}`, as FeedForward's, and `shared_gate/kernel` (embed, 1), with
    `shared_gate/bias` (1,) where asked for.

    Reverse-mode differentiable, once. Inside a jax.shard_map of yours it needs check_vma=False.

    Sown, where the collection is mutable: the layer's RouterStatistics as "statistics" into "router", the chosen
    experts (batch, seq, k) as "value" into "chosen".

    Attributes:
      num_experts, experts_per_token: as named; the second is k.
      mlp_dim: width of each expert's hidden layer.
      activation: of the experts, shared ones too: "swiglu" as above, or "swiglu_clamped", whose hidden layer is
        kernels.swiglu.clamped_swiglu.
      clamp: of swiglu_clamped; nothing else reads it.
      normalize_weights: divide a token's k weights by their sum.
      shared_experts: how many experts every token passes besides, with weight 1 (2401.06066).
      shared_mlp_dim: width of the shared experts together; None: shared_experts * mlp_dim.
      shared_gate: what the shared experts give is multiplied by sigmoid(x @ kernel), one number for each token.
      shared_gate_bias: that number is sigmoid(x @ kernel + bias).
      balance_bias: add a bias to the router's softmax for the choice of experts; it has no gradient and is moved by
        training alone (training/router_balance.py). Loss-free balancing, 2408.15664.
      use_bias: biases on the router and on all projections, unless the next two say otherwise.
      use_output_bias: biases on down, of the shared experts too; None: use_bias.
      use_router_bias: a bias on the router; None: use_bias.
      dispatch: what computes the experts, see kernels.expert_dispatch.
      dtype, param_dtype: of the computation and of the parameters.
      router_init, input_init, up_init, output_init: initializers of the router, of gate, of up (None: input_init), and
        of down.
    """

    num_experts: int
    experts_per_token: int
    mlp_dim: int
    activation: str = "swiglu"
    clamp: SwigluClamp = SwigluClamp()
    normalize_weights: bool = False
    shared_experts: int = 0
    shared_mlp_dim: int | None = None
    shared_gate: bool = False
    shared_gate_bias: bool = False
    balance_bias: bool = False
    use_bias: bool = False
    use_output_bias: bool | None = None
    use_router_bias: bool | None = None
    dispatch: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    router_init: Callable[..., Array] = truncated_normal(0.02)
    input_init: Callable[..., Array] = truncated_normal(0.02)
    up_init: Callable[..., Array] | None = None
    output_init: Callable[..., Array] = truncated_normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        if not 1 <= self.experts_per_token <= self.num_experts:
            right = f"must be between 1 and num_experts={self.num_experts}"
            raise ValueError(f"experts_per_token={self.experts_per_token} {right}")
        if self.activation not in EXPERT_ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: must be {' or '.join(EXPERT_ACTIVATIONS)}")
        if self.dispatch not in EXPERT_DISPATCHES:
            raise ValueError(f"dispatch={self.dispatch!r}: must be {', '.join(EXPERT_DISPATCHES)}")
        check_at_least_one("mlp_dim", self.mlp_dim)
        check_stream(x)
        logits = nn.Dense(
            self.num_experts,
            use_bias=self.use_bias if self.use_router_bias is None else self.use_router_bias,
            dtype=jnp.promote_types(self.dtype, jnp.float32),
            param_dtype=self.param_dtype,
            kernel_init=self.router_init,
            precision=jax.lax.Precision.HIGHEST,
            dot_general=rows_product,
            name="router",
        )(x)
        bias = None
        if self.balance_bias:
            bias = self.param("balance_bias", nn.initializers.zeros, (self.num_experts,), self.param_dtype)
        weights, chosen = choose_experts(
            logits, self.experts_per_token, normalize=self.normalize_weights, balance_bias=bias
        )
        self._sow(logits, chosen)
        y = self._experts(x.astype(self.dtype), weights, chosen)
        return y if self.shared_experts == 0 else y + self._shared(x)

    @property
    def _has_output_bias(self) -> bool:
        return self.use_bias if self.use_output_bias is None else self.use_output_bias

    def _shared(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """What the shared experts add."""
        width = self.shared_experts * self.mlp_dim if self.shared_mlp_dim is None else self.shared_mlp_dim
        shared = FeedForward(
            mlp_dim=width,
            activation=self.activation,
            use_bias=self.use_bias,
            use_output_bias=self._has_output_bias,
            clamp=self.clamp,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            input_init=self.input_init,
            up_init=self.up_init,
            output_init=self.output_init,
            name="shared",
        )
        if not self.shared_gate:
            return shared(x)
        gate = nn.Dense(
            1,
            use_bias=self.shared_gate_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.router_init,
            dot_general=rows_product,
            name="shared_gate",
        )
        return jax.nn.sigmoid(gate(x)) * shared(x)

    def _sow(self, logits: Array, chosen: Array) -> None:
        if self.is_initializing():  # where every collection is
            return
        if self.is_mutable_collection(ROUTER):
            self.sow(ROUTER, "statistics", router_statistics(logits, chosen))
        if self.is_mutable_collection(CHOSEN):
            self.sow(CHOSEN, "value", chosen)

    def _experts(self, x: Array, weights: Array, chosen: Array) -> Array:
        """What the chosen experts add; weights are in float32 at least."""
        experts, embed, mlp = self.num_experts, x.shape[-1], self.mlp_dim
        projection = partial(ExpertProjection, dtype=self.dtype, param_dtype=self.param_dtype)
        read = partial(projection, (experts, embed, mlp), use_bias=self.use_bias)
        gate, gate_bias = read(kernel_init=self.input_init, name="expert_gate")()
        up_init = self.input_init if self.up_init is None else self.up_init
        up, up_bias = read(kernel_init=up_init, name="expert_up")()
        down, down_bias = projection(
            (experts, mlp, embed), use_bias=self._has_output_bias, kernel_init=self.output_init, name="expert_down"
        )()
        if self.use_bias:
            # They ride on one more channel, which is 1: dispatches need not know of them.
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
            gate = jnp.concatenate([gate, present(gate_bias)[:, None]], axis=1)
            up = jnp.concatenate([up, present(up_bias)[:, None]], axis=1)
            down = jnp.pad(down, ((0, 0), (0, 0), (0, 1)))
        kernels = ExpertKernels(gate, up, down, self.clamp if self.activation == CLAMPED else None)
        y = apply_experts_on_mesh(x, kernels, weights, chosen, dispatch=self.dispatch)[..., :embed]
        if down_bias is None:
            return y
        one_hot = chosen[..., None] == jnp.arange(experts)
        per_expert = jnp.where(one_hot, weights[..., None], 0).sum(-2)
        # The weights are not rounded to the compute dtype, and the sum is rounded once.
        biases = jnp.einsum(
            "bse,ed->bsd", per_expert, down_bias.astype(weights.dtype), precision=jax.lax.Precision.HIGHEST
        )
        return (y.astype(weights.dtype) + biases).astype(self.dtype)
