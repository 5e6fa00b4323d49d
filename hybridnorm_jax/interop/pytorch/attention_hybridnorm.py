"""The attention branch of a HybridNorm model.

torch's scaled_dot_product_attention computes it wherever it can. It knows no cap and no sinks, so models with one of
these compute the scores in plain sight, in float32 at least.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .configuration_hybridnorm import HEAD_NORMS
from .norms_hybridnorm import HeadScales, capped, head_norm
from .positions_hybridnorm import rotate
from .sphere_hybridnorm import StoredScale, unit, wide


class Attention(nn.Module):
    """softmax(scale * N(q) N(k)^T + mask) N(v), normalized, times W_O. Norms stand before the rotation.

    Parameters: those of the projections and norms, `sinks` (heads,): the softmax has one more term exp(sink),
    `head_scales`, see HybridNormConfig, and of `sphere` `qk_scale` (key heads, head_dim): q and k have length 1, times
    these numbers.
    """

    def __init__(self, config, layer, placement):
        super().__init__()
        self.layer, self.head_dim, self.clip = layer, config.head_dim, config.qkv_clip
        self.scale, self.cap, self.causal = config.score_scale, config.score_cap, config.causal
        self.window, self.rotation = config.layer_windows[layer], config.layer_rotations[layer]
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.extents = {name: getattr(placement, name) for name in HEAD_NORMS}
        width, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=config.has_attention_output_bias)
        for name, count in zip(HEAD_NORMS, (heads, kv_heads, kv_heads, heads), strict=True):
            if self.extents[name] is not None:
                setattr(self, name, head_norm(config, self.extents[name], count))
        self.head_scales_stand = placement.head_scales
        self.head_scales = HeadScales(heads) if placement.head_scales else nn.Identity()
        self.qk_scale = StoredScale(kv_heads, self.head_dim, stored=width**-0.5) if placement.sphere else None
        if placement.sphere and config.attention_scale is None:
            self.scale = self.head_dim**0.5
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.attention_sinks else None

    def forward(self, x, turns, masks, cache, place):
        """What attention adds to the stream (batch, tokens, width).

        Args:
          turns: of `rotations`. masks: of `masks`. place: the numbers of these tokens in the cache.
        """
        q = self.heads("q_norm", self.q_proj(x)).transpose(1, 2)
        k = self.heads("k_norm", self.k_proj(x)).transpose(1, 2)
        v = self.heads("v_norm", self.v_proj(x)).transpose(1, 2)
        by, mask = turns.get(self.rotation), masks[self.window]
        if by is not None:
            q, k = rotate(q, by), rotate(k, by)
        if self.qk_scale is not None:
            scale = self.qk_scale.numbers()[:, None]
            q = (unit(wide(q)) * scale.repeat_interleave(self.groups, dim=0)).to(q.dtype)
            k = (unit(wide(k)) * scale).to(k.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer, {"cache_position": place})
        context = self.context(q, k, v, mask)
        context = self.heads("context_norm", context.transpose(1, 2).flatten(2)).flatten(2)
        if self.head_scales_stand == "before":
            return self.o_proj(self.head_scales(context))
        return self.head_scales(self.o_proj(context))

    def heads(self, name, x):
        """x (batch, tokens, heads * head_dim) as (batch, tokens, heads, head_dim), normalized where the norm exists."""
        if self.clip is not None and name != "context_norm":
            x = x.clamp(-self.clip, self.clip)
        if self.extents[name] == "projection":
            x = getattr(self, name)(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return getattr(self, name)(x) if self.extents[name] == "head" else x

    def context(self, q, k, v, mask):
        """The values that each query sees, weighted; (batch, heads, tokens, head_dim)."""
        if self.groups > 1 and mask is not None:  # with a mask torch has no fast kernel for shared heads
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        if self.cap is not None or self.sinks is not None:
            return self.context_of_scores(wide(q @ k.mT) * self.scale, v, mask)
        # In this order the value is a bool also where the length is a symbol of torch.compile.
        is_causal = self.causal and q.shape[2] > 1 and mask is None
        kind = {"is_causal": is_causal, "enable_gqa": self.groups > 1 and mask is None}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, **kind)

    def context_of_scores(self, scores, v, mask):
        """As context, of scores that are computed already, with a mask that is not None."""
        scores = capped(self.cap, scores)
        # Not -inf: in a mask that a caller gave, a row of padding may be empty, whose softmax would be NaN.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
        if self.sinks is None:
            return scores.softmax(-1).to(v.dtype) @ v
        sinks = self.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return weights.to(v.dtype) @ v
