"""A Pre-LN GPT as another Flax Linen code base might have it: it knows nothing of hybridnorm_jax."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x))."""

    width: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(
            self.num_heads, qkv_features=self.num_heads * self.head_dim, out_features=self.width, name="attention"
        )
        x = x + attention(self.norm(name="norm_1")(x), mask=mask)
        hidden = nn.gelu(nn.Dense(self.mlp_dim, name="up")(self.norm(name="norm_2")(x)))
        return x + nn.Dense(self.width, name="down")(hidden)


class GPT(nn.Module):
    """Logits (batch, seq, vocab) of tokens (batch, seq), with learned positions and an untied head."""

    vocab_size: int = 29
    max_length: int = 16
    num_layers: int = 3
    width: int = 20
    num_heads: int = 2
    head_dim: int = 10
    mlp_dim: int = 48
    norm: Callable[..., nn.Module] = nn.LayerNorm

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab_size, self.width, name="tokens")(tokens)
        x = x + nn.Embed(self.max_length, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        mask = nn.make_causal_mask(tokens)
        for layer in range(self.num_layers):
            x = Block(self.width, self.num_heads, self.head_dim, self.mlp_dim, self.norm, name=f"block_{layer}")(
                x, mask
            )
        return nn.Dense(self.vocab_size, name="head")(self.norm(name="final_norm")(x))
