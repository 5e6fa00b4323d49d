"""The attention branch: grouped-query causal self-attention with norms on q, k, v and context, and RoPE."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.attention import causal_attention
from hybridnorm_jax.kernels.blockwise import attention_statistics
from hybridnorm_jax.model.initializers import truncated_normal
from hybridnorm_jax.model.norms import Norm
from hybridnorm_jax.model.placement import HeadNorm
from hybridnorm_jax.model.signal_measures import SIGNAL

Rotation = tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]


def rotation(positions: Int[Array, "batch seq"], rotary_dim: int, theta: float, dtype: Any = jnp.float32) -> Rotation:
    """cos and sin of positions * theta^(-2i / rotary_dim), i < rotary_dim / 2, one for all heads.

    Source: RoPE (2104.09864). At least float32: at position 1e5 bfloat16 has no fraction left.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    wavelengths = theta ** (jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
    angles = positions[:, :, None, None].astype(dtype) / wavelengths
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch seq heads head_dim"], by: Rotation) -> Float[Array, "batch seq heads head_dim"]:
    """RoPE on the leading 2 * half channels, channel i paired with i + half; the rest passes unchanged."""
    cos, sin = by
    half = cos.shape[-1]
    first, second = x[..., :half].astype(cos.dtype), x[..., half : 2 * half].astype(cos.dtype)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)


class Attention(nn.Module):
    """softmax(N(q) N(k)^T / sqrt(head_dim) + causal mask) N(v), normalized, times W_O. HybridNorm (2503.04598), eq. 5.

    Query head h reads key and value head h // (num_heads / num_kv_heads). Norms stand before RoPE.

    Parameters: `query/kernel` (embed, heads, head_dim), `key/kernel` and `value/kernel` (embed, kv_heads, head_dim),
    `out/kernel` (heads, head_dim, embed), their `bias` where asked for, and `q_norm`, `k_norm`, `v_norm`,
    `context_norm` with `scale` (head_dim,), or (heads * head_dim,) over the projection.

    Attributes:
      num_heads, num_kv_heads, head_dim: as named.
      q_norm, k_norm, v_norm, context_norm: None, "head" or "projection".
      norm: makes the norms; a function of `name`.
      use_bias: biases on the four projections.
      backend: what computes the attention itself, see kernels.attention.
      dtype, param_dtype: of the computation and of the parameters.
      input_init, value_init, output_init: initializers of q and k, of v, and of the output projection.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: HeadNorm = None
    k_norm: HeadNorm = None
    v_norm: HeadNorm = None
    context_norm: HeadNorm = None
    norm: Callable[..., nn.Module] = Norm
    use_bias: bool = False
    backend: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    input_init: Callable = truncated_normal(0.02)
    value_init: Callable = truncated_normal(0.02)
    output_init: Callable = truncated_normal(0.02)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        by: Rotation | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """`by` rotates q and k (None: learned positions); segment_ids keep documents apart."""
        dense = partial(nn.DenseGeneral, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        q = dense((self.num_heads, self.head_dim), kernel_init=self.input_init, name="query")(x)
        k = dense((self.num_kv_heads, self.head_dim), kernel_init=self.input_init, name="key")(x)
        v = dense((self.num_kv_heads, self.head_dim), kernel_init=self.value_init, name="value")(x)
        q, k, v = self._normalize("q_norm", q), self._normalize("k_norm", k), self._normalize("v_norm", v)
        if by is not None:
            q, k = rotate(q, by), rotate(k, by)
        self._watch(q, k, segment_ids)
        context = causal_attention(q, k, v, segment_ids=segment_ids, backend=self.backend)
        context = self._normalize("context_norm", context)
        return dense(x.shape[-1], axis=(-2, -1), kernel_init=self.output_init, name="out")(context)

    def _watch(self, q, k, segment_ids) -> None:
        if self.is_mutable_collection(SIGNAL) and not self.is_initializing():
            entropy, largest = attention_statistics(q, k, segment_ids)
            self.sow(SIGNAL, "attention_entropy", entropy)
            self.sow(SIGNAL, "largest_logit", largest)

    def _normalize(self, name: str, heads: Float[Array, "batch seq heads head_dim"]):
        match getattr(self, name):
            case None:
                return heads
            case "head":
                return self.norm(name=name)(heads)
            case "projection":
                return self.norm(name=name)(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)
