"""A Pre-LN GPT as another Flax NNX code base might have it: it knows nothing of hybridnorm_jax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    """Causal softmax attention in the dtype of x; `made` are the arguments of every nnx.LinearGeneral."""

    def __init__(self, width: int, num_heads: int, head_dim: int, **made):
        heads = (num_heads, head_dim)
        self.query, self.key, self.value = (nnx.LinearGeneral(width, heads, **made) for _ in range(3))
        self.out = nnx.LinearGeneral(heads, width, axis=(-2, -1), **made)

    def __call__(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), v))


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, num_heads: int, head_dim: int, mlp_dim: int, norm: Callable, **made):
        self.norm_1, self.norm_2 = norm(width, **made), norm(width, **made)
        self.attention = Attention(width, num_heads, head_dim, **made)
        self.up = nnx.Linear(width, mlp_dim, **made)
        self.down = nnx.Linear(mlp_dim, width, **made)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm_2(x))))


class GPT(nnx.Module):
    """Logits (batch, seq, vocab) of tokens (batch, seq); `norm(width, param_dtype=..., rngs=...)` makes one norm."""

    def __init__(
        self,
        *,
        vocab_size: int = 29,
        max_length: int = 16,
        num_layers: int = 3,
        width: int = 20,
        num_heads: int = 2,
        head_dim: int = 10,
        mlp_dim: int = 48,
        norm: Callable = nnx.LayerNorm,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        made = {"param_dtype": param_dtype, "rngs": rngs}
        self.tokens = nnx.Embed(vocab_size, width, **made)
        self.positions = nnx.Embed(max_length, width, **made)
        self.blocks = nnx.List([Block(width, num_heads, head_dim, mlp_dim, norm, **made) for _ in range(num_layers)])
        self.final_norm = norm(width, **made)
        self.head = nnx.Linear(width, vocab_size, **made)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))
