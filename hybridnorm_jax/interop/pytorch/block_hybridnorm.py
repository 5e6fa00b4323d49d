"""One block of a HybridNorm model, and what transformers asks of every such model."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_hybridnorm import Attention
from .configuration_hybridnorm import HybridNormConfig
from .feed_forward_hybridnorm import Experts, FeedForward, MixtureOfExperts
from .norms_hybridnorm import GATE_RANK, HeadScales, LayerScale, Norm, apply_formula, placement_of, stream_norm
from .sphere_hybridnorm import ChordStep, StoredScale

# How far along the chord a block goes at first.
CHORD_START = 0.05


class SublayerNorms(NamedTuple):
    """What stands around a branch: norms, and learned scales with the norm or in its place."""

    pre: Any
    branch: Any
    layer_scale: Any
    post: Any
    residual: Any
    entry: Any
    side: Any
    own: Any


class HybridNormBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each by the formula."""

    def __init__(self, config, layer):
        super().__init__()
        self.placement = placement_of(config, layer)
        self.self_attn = Attention(config, layer, self.placement)
        has_experts = config.num_experts and layer not in config.dense_layers
        dense = None if has_experts else FeedForward(config, config.dense_width, placement=self.placement)
        self.mlp = MixtureOfExperts(config) if has_experts else dense
        self.dropout = nn.Dropout(config.dropout)
        for name in ("attention", "feed_forward"):
            parts = getattr(self.placement, name)
            has_pre = parts.pre and not (name == "feed_forward" and self.placement.shared_pre_norm)
            setattr(self, f"{name}_pre_norm", stream_norm(config, has_pre, parts.pre_norm_init))
            setattr(self, f"{name}_branch_norm", stream_norm(config, parts.branch, parts.branch_norm_init))
            setattr(self, f"{name}_post_norm", stream_norm(config, parts.post))
            has_own = not (name == "feed_forward" and self.placement.shared_layer_scale)
            setattr(self, f"{name}_layer_scale", layer_scale(config, parts) if has_own else nn.Identity())
            setattr(self, f"{name}_residual_vector", vector(config, parts.residual_vector))
            setattr(self, f"{name}_entry_norm", stream_norm(config, parts.entry))
            setattr(self, f"{name}_side_norm", stream_norm(config, parts.side == "read"))
            setattr(self, f"{name}_own_norm", stream_norm(config, parts.side_own == "norm"))
            setattr(self, f"{name}_own_vector", vector(config, parts.side_own == "vector"))

    def forward(self, x, side=None, turns=None, masks=None, cache=None, place=None):
        """(the stream after this block, the side stream or None), of (batch, tokens, width)."""

        def attend(x):
            return self.dropout(self.self_attn(x, turns, masks, cache, place))

        def feed_forward(x):
            return self.dropout(self.mlp(x))

        shared = None
        if self.placement.shared_pre_norm:  # computed once: both branches read the block's input
            normalized = self.attention_pre_norm(x)

            def shared(_):
                return normalized

        attention_norms, feed_forward_norms = self.norms("attention", shared), self.norms("feed_forward", shared)
        y, side = apply_formula(attend, x, x, side, self.placement.attention, attention_norms)
        return apply_formula(feed_forward, y, x, side, self.placement.feed_forward, feed_forward_norms)

    def norms(self, name, shared_pre):
        """The norms of a branch and its learned scales."""
        own_norm = getattr(self, f"{name}_own_norm")
        has_vector = isinstance(own_norm, nn.Identity)
        shared = self.placement.shared_layer_scale
        scale = self.attention_layer_scale if shared else getattr(self, f"{name}_layer_scale")
        return SublayerNorms(
            pre=getattr(self, f"{name}_pre_norm") if shared_pre is None else shared_pre,
            branch=getattr(self, f"{name}_branch_norm"),
            layer_scale=scale,
            post=getattr(self, f"{name}_post_norm"),
            residual=getattr(self, f"{name}_residual_vector"),
            entry=getattr(self, f"{name}_entry_norm"),
            side=getattr(self, f"{name}_side_norm"),
            own=getattr(self, f"{name}_own_vector") if has_vector else own_norm,
        )


def vector(config, present):
    """A learned number for each channel, which starts at 1; the identity where it is not present."""
    return LayerScale(config.hidden_size) if present else nn.Identity()


def layer_scale(config, parts):
    """The learned scale behind a branch; the identity where there is none."""
    kind = "channel" if config.layer_scale else parts.layer_scale
    if kind is None:
        return nn.Identity()
    if parts.joins == "chord":
        return ChordStep(config.hidden_size, start=CHORD_START, stored=config.hidden_size**-0.5)
    return LayerScale(1 if kind == "scalar" else config.hidden_size, parts.layer_scale_init)


class HybridNormPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model: what it can do, and how fresh weights are drawn."""

    config_class = HybridNormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridNormBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Weights that are in no checkpoint: N(0, initializer_range^2), scales as the placement says, biases 0.

        What norms have besides starts as STARTS says; of the gate's matrices the variance is one over their rows.
        """
        std = self.config.initializer_range
        if isinstance(module, Norm) and module.weight is not None:
            nn.init.constant_(module.weight, module.initial_scale)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            for kernel in (module.gate_proj, module.up_proj, module.down_proj):
                nn.init.normal_(kernel, std=std)
        if isinstance(module, Norm):
            for name, start in module.starts.items():
                nn.init.constant_(getattr(module, name), start)
            if module.kind == "gated":
                nn.init.normal_(module.down, std=module.size**-0.5)
                nn.init.normal_(module.up, std=GATE_RANK**-0.5)
        if isinstance(module, (LayerScale, StoredScale)):
            nn.init.constant_(module.weight, module.start)
        if isinstance(module, HeadScales):
            nn.init.ones_(module.weight)
        for name in ("bias", "gate_bias", "up_bias", "down_bias", "balance_bias", "sinks"):
            if getattr(module, name, None) is not None:
                nn.init.zeros_(getattr(module, name))
