"""A Pre-LN ViT as another Flax Linen code base might have it, with its own attention: one kernel for q, k and v."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn


class SelfAttention(nn.Module):
    """Softmax attention over all positions; query, key and value come from one projection without a head axis."""

    width: int
    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x):
        qkv = nn.Dense(3 * self.num_heads * self.head_dim, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.num_heads, self.head_dim), 2, 0)
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / self.head_dim**0.5)
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.Dense(self.width, name="projection")(context.reshape(*x.shape[:2], -1))


class EncoderBlock(nn.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x))."""

    width: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        x = x + SelfAttention(self.width, self.num_heads, self.head_dim, name="attention")(self.norm(name="norm_1")(x))
        hidden = nn.gelu(nn.Dense(self.mlp_dim, name="up")(self.norm(name="norm_2")(x)))
        return x + nn.Dense(self.width, name="down")(hidden)


class ViT(nn.Module):
    """Class logits (batch, classes) of images (batch, height, width, channels), read from the class token."""

    num_classes: int = 7
    patch: int = 4
    num_layers: int = 2
    width: int = 20
    num_heads: int = 2
    head_dim: int = 10
    mlp_dim: int = 48
    norm: Callable[..., nn.Module] = nn.LayerNorm

    @nn.compact
    def __call__(self, images):
        batch, patch = images.shape[0], (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", name="patches")(images)
        x = x.reshape(batch, -1, self.width)
        class_token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(class_token, (batch, 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for layer in range(self.num_layers):
            x = EncoderBlock(
                self.width, self.num_heads, self.head_dim, self.mlp_dim, self.norm, name=f"encoder_{layer}"
            )(x)
        return nn.Dense(self.num_classes, name="head")(self.norm(name="final_norm")(x)[:, 0])
