"""What stands around the blocks of an Encoder: patches and learned tokens before them, pooling behind them."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hybridnorm_jax.kernels.dense_products import rows_product
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.model.encoder_config import EncoderConfig
from hybridnorm_jax.model.feed_forward import FeedForward, SwigluClamp
from hybridnorm_jax.model.formula import Stream
from hybridnorm_jax.model.initializers import truncated_normal
from hybridnorm_jax.model.outside import outer_norm

Pixels = Float[Array, "batch height width channels"]


class PatchEmbedding(nn.Module):
    """patch @ kernel + bias for each patch of an image, row by row.

    Parameters: `kernel` (patch_height, patch_width, channels, embed), as of flax.linen.Conv, and `bias` (embed,) where
    asked for. Pixels behind the last whole patch are not read.
    """

    patch_size: tuple[int, int]
    width: int
    use_bias: bool
    std: float | Array
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, pixels: Pixels) -> Stream:
        """(batch, patches, embed), in the compute dtype."""
        height, width = self.patch_size
        batch, rows, columns, channels = *self._grid(pixels), pixels.shape[-1]
        shape = (height, width, channels, self.width)
        kernel = self.param("kernel", truncated_normal(self.std), shape, jnp.dtype(self.param_dtype))
        cut = pixels[:, : rows * height, : columns * width].astype(self.dtype)
        patches = cut.reshape(batch, rows, height, columns, width, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, rows * columns, height * width * channels)
        matrix = kernel.astype(self.dtype).reshape(height * width * channels, self.width)
        embedded: Stream = rows_product(patches, matrix, (((2,), (0,)), ((), ())))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.dtype(self.param_dtype))
            embedded = embedded + bias.astype(embedded.dtype)
        return embedded

    def _grid(self, pixels: Pixels) -> tuple[int, int, int]:
        batch, height, width, _ = pixels.shape
        return batch, height // self.patch_size[0], width // self.patch_size[1]


class LearnedTokens(nn.Module):
    """Tokens that every sequence has: a class token, registers, a probe.

    Parameters: `embedding` (count, embed).
    """

    count: int
    width: int
    std: float | Array
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self) -> Float[Array, "count embed"]:
        """The tokens, in the compute dtype."""
        init = truncated_normal(self.std)
        tokens: Array = self.param("embedding", init, (self.count, self.width), jnp.dtype(self.param_dtype))
        return tokens.astype(self.dtype)


class AttentionPooling(nn.Module):
    """y = a + MLP(N(a)), a = MultiHead(probe, x, x): one learned query reads all positions. SigLIP (2303.15343).

    Parameters: `probe/embedding` (1, embed), `attention/query|key|value/kernel` (embed, heads, head_dim),
    `attention/out/kernel` (heads, head_dim, embed), `norm/scale`, `feed_forward/...`, and biases of all projections.

    Attributes:
      config: of the encoder; heads are whole_width / num_heads wide.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Stream) -> Float[Array, "batch embed"]:
        config = self.config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        probe = LearnedTokens(
            1, config.whole_width, config.init_std, dtype=config.dtype, param_dtype=config.param_dtype, name="probe"
        )()
        read = ProbeAttention(config, name="attention")(probe[None], x)
        norm = outer_norm(config, kind=config.pooling_norm, name="norm")
        feed_forward = FeedForward(
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            use_bias=True,
            clamp=SwigluClamp(limit=config.clamp_limit, alpha=config.clamp_alpha),
            dtype=dtype,
            param_dtype=param_dtype,
            input_init=truncated_normal(config.init_std),
            output_init=truncated_normal(config.init_std),
            name="feed_forward",
        )
        return (read + feed_forward(norm(read)))[:, 0]


class ProbeAttention(nn.Module):
    """softmax(q K^T / sqrt(head_dim)) V of one query for all sequences, with biases on all projections."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, probe: Float[Array, "1 1 embed"], x: Stream) -> Float[Array, "batch 1 embed"]:
        config, width = self.config, x.shape[-1]
        head_dim = width // config.num_heads

        def dense(features: int | tuple[int, int], name: str, axis: int | tuple[int, int] = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis=axis,
                dtype=jnp.dtype(config.dtype),
                param_dtype=jnp.dtype(config.param_dtype),
                kernel_init=truncated_normal(config.init_std),
                dot_general=rows_product,
                name=name,
            )

        heads = (config.num_heads, head_dim)
        q, k, v = dense(heads, "query")(probe), dense(heads, "key")(x), dense(heads, "value")(x)
        wide = wide_dtype(x.dtype)
        scores = jnp.einsum("qhd,bshd->bhqs", q[0], k, preferred_element_type=wide) / math.sqrt(head_dim)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        context = jnp.einsum("bhqs,bshd->bqhd", weights, v)
        return dense(width, "out", axis=(-2, -1))(context)
