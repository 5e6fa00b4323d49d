"""One transformer block: the formula, applied to attention and to the feed-forward layer as the placement says."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.model.attention import Attention, Rotation
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.feed_forward import FeedForward
from hybridnorm_jax.model.initializers import std_factor, truncated_normal
from hybridnorm_jax.model.moe import MoE
from hybridnorm_jax.model.norms import Norm, zero_mean_defect
from hybridnorm_jax.model.placement import BlockPlacement, SublayerPlacement
from hybridnorm_jax.model.signal_measures import PROBE, SIGNAL, gradient_probe, stream_rms, token_similarity


@flax.struct.dataclass
class LayerInputs:
    """What differs between the layers of a run; scanned over.

    Attributes:
      layer: number of the layer, from 0.
      attention, feed_forward: (residual_scale, branch_scale, input_scale), each None where it is 1 in every layer.
    """

    layer: Int[Array, ""]
    attention: tuple[Float[Array, ""] | None, ...]
    feed_forward: tuple[Float[Array, ""] | None, ...]


# Collections that Block and Decoder fill where an invariant check makes them mutable; nothing is computed otherwise.
# So it is with SIGNAL and PROBE, of signal_measures.py.
STREAM, DEFECT = "stream", "stream_defect"


@flax.struct.dataclass
class SharedInputs:
    """What is the same for all layers: the rotation of q and k, and the documents' segment ids, or None."""

    rotation: Rotation | None
    segment_ids: Int[Array, "batch seq"] | None


def times(scale: Float[Array, ""] | None, x: Array) -> Array:
    """scale * x in the dtype of x; a scale of None is 1."""
    return x if scale is None else scale.astype(x.dtype) * x


class Block(nn.Module):
    """Attention and feed-forward, each as post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x)))).

    Parameters: `attention/...`, `feed_forward/...`, and of the norms that the placement has `attention_pre_norm`,
    `attention_branch_norm`, `attention_post_norm`, `feed_forward_pre_norm`, ... with `scale` and `bias` (embed,).

    Attributes:
      config: sizes, kinds and dtypes.
      placement: the structure of this block (its scales come with each layer's inputs).
      deterministic: no dropout.
    """

    config: ModelConfig
    placement: BlockPlacement
    deterministic: bool = True

    @nn.compact
    def __call__(self, stream: Float[Array, "batch seq embed"], layer: LayerInputs, shared: SharedInputs):
        """Returns (stream after this block, None), as nn.scan wants it."""
        attention = self._attention(layer.layer)
        feed_forward = self._feed_forward(layer.layer)
        block_input = stream
        stream = self._sublayer(
            "attention",
            lambda x: attention(x, shared.rotation, shared.segment_ids),
            stream,
            block_input,
            layer.attention,
        )
        stream = self._sublayer("feed_forward", feed_forward, stream, block_input, layer.feed_forward)
        stream = watch_stream(self, stream)
        return nn.with_logical_constraint(stream, ("batch", "seq", None)), None

    def _sublayer(self, name: str, f: Callable, sublayer_input: Array, block_input: Array, scales) -> Array:
        placement: SublayerPlacement = getattr(self.placement, name)
        residual_scale, branch_scale, input_scale = scales
        pre, branch, post = (self._norm_or_identity(name, which) for which in ("pre", "branch", "post"))
        dropout = nn.Dropout(self.config.dropout, deterministic=self.deterministic)

        x = block_input if placement.reads == "block" else sublayer_input
        r = block_input if placement.residual == "block" else sublayer_input
        r = r + block_input if placement.residual == "both" else r
        return post(times(residual_scale, r) + times(branch_scale, branch(dropout(f(times(input_scale, pre(x)))))))

    def _norm_or_identity(self, sublayer: str, which: str) -> Callable:
        placement = getattr(self.placement, sublayer)
        if not getattr(placement, which):
            return lambda x: x
        scale_init = placement.branch_norm_init if which == "branch" else 1.0
        return stream_norm(self.config, name=f"{sublayer}_{which}_norm", scale_init=scale_init)

    def _initializer(self, role: str, layer: Int[Array, ""]) -> Callable:
        factor = std_factor(self.config.initializer_name, role, layer, self.config.num_layers)
        return truncated_normal(self.config.init_std * factor)

    def _attention(self, layer: Int[Array, ""]) -> Attention:
        config, placement = self.config, self.placement
        norm = partial(
            Norm,
            kind=config.attention_norm_kind,
            eps=config.norm_eps,
            use_scale=config.attention_norm_scale,
            use_bias=config.attention_norm_bias,
            param_dtype=jnp.dtype(config.param_dtype),
        )
        return Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            q_norm=placement.q_norm,
            k_norm=placement.k_norm,
            v_norm=placement.v_norm,
            context_norm=placement.context_norm,
            norm=norm,
            use_bias=config.attention_bias,
            backend=config.attention,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            input_init=self._initializer("input", layer),
            value_init=self._initializer("value", layer),
            output_init=self._initializer("output", layer),
            name="attention",
        )

    def _feed_forward(self, layer: Int[Array, ""]) -> FeedForward | MoE:
        config = self.config
        both = {
            "mlp_dim": config.mlp_dim,
            "use_bias": config.mlp_bias,
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            "input_init": self._initializer("feed_forward", layer),
            "output_init": self._initializer("output", layer),
            "name": "feed_forward",
        }
        if config.num_experts == 0:
            return FeedForward(activation=config.activation, **both)
        return MoE(
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            normalize_weights=config.normalize_expert_weights,
            shared_experts=config.shared_experts,
            balance_bias=config.balance_bias,
            dispatch=config.expert_dispatch,
            router_init=self._initializer("input", layer),
            **both,
        )


def watch_stream(module: nn.Module, stream: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
    """Sow the stream into STREAM, norms.zero_mean_defect of it into DEFECT, and what signal_measures says of it into
    SIGNAL, each where it is mutable. Returns the stream, whose gradient is measured where PROBE has a place for it."""
    if module.is_initializing():  # where every collection is
        return stream
    if module.is_mutable_collection(STREAM):
        module.sow(STREAM, "value", stream)
    if module.is_mutable_collection(DEFECT):
        module.sow(DEFECT, "value", zero_mean_defect(stream, module.config.norm_width))
    if module.is_mutable_collection(SIGNAL):
        module.sow(SIGNAL, "stream_rms", stream_rms(stream))
        module.sow(SIGNAL, "token_similarity", token_similarity(stream))
    if module.has_variable(PROBE, "square"):
        stream = gradient_probe(stream, module.get_variable(PROBE, "square"))
    return stream


def stream_norm(config: ModelConfig, **attributes: Any) -> Norm:
    """A norm on the residual stream, with the model's kind, width, eps, affine parameters and parameter dtype."""
    return Norm(
        kind=config.norm,
        eps=config.norm_eps,
        use_scale=config.norm_scale,
        use_bias=config.norm_bias,
        width=config.norm_width,
        param_dtype=jnp.dtype(config.param_dtype),
        **attributes,
    )
