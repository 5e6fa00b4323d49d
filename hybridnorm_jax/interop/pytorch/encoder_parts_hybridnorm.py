"""What stands around the blocks of a HybridNorm encoder: patches and learned tokens before, pooling behind."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .feed_forward_hybridnorm import FeedForward
from .norms_hybridnorm import outer_norm
from .sphere_hybridnorm import wide


class PatchEmbedding(nn.Conv2d):
    """A linear map of each patch of an image, row by row: pixels (batch, channels, height, width)."""

    def __init__(self, config):
        shape = config.patch_shape
        super().__init__(config.num_channels, config.whole_width, shape, stride=shape, bias=config.patch_bias)
        self.shape = (config.num_channels, *config.image_shape)

    def forward(self, pixels):
        """(batch, patches, width)."""
        if pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            right = f"(batch, {', '.join(map(str, self.shape))})"
            raise ValueError(
                f"pixel_values: shape {tuple(pixels.shape)} must be {right}; positions are not interpolated"
            )
        return super().forward(pixels.to(self.weight.dtype)).flatten(2).mT


class LearnedTokens(nn.Module):
    """Tokens that every input has: a class token, registers, a probe. `weight` is (count, width)."""

    def __init__(self, count, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, batch):
        """(batch, count, width)."""
        return self.weight.expand(batch, -1, -1)


class AttentionPooling(nn.Module):
    """y = a + MLP(N(a)), a = MultiHead(probe, x, x): one learned query reads all positions (2303.15343)."""

    def __init__(self, config):
        super().__init__()
        width = config.whole_width
        self.head_dim = width // config.num_attention_heads
        self.probe = LearnedTokens(1, width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.norm = outer_norm(config, kind=config.pooling_norm)
        self.mlp = FeedForward(config, config.intermediate_size, size=width, has_biases=True)

    def forward(self, x, is_token=None):
        """(batch, width) of x (batch, positions, width); is_token (batch, positions): which are read, None: all."""
        q, k, v = self.q_proj(self.probe(x.shape[0])), self.k_proj(x), self.v_proj(x)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        mask = None if is_token is None else is_token[:, None, None]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.head_dim**-0.5)
        read = self.o_proj(context.transpose(1, 2).flatten(2))
        return (read + self.mlp(self.norm(read)))[:, 0]


def mean_of(x, is_token=None):
    """The mean over positions of x (batch, positions, width); is_token (batch, positions): of which, None: of all."""
    if is_token is None:
        return wide(x).mean(1).to(x.dtype)
    weights = wide(is_token.to(x.dtype))[..., None]
    return ((wide(x) * weights).sum(1) / weights.sum(1)).to(x.dtype)
