"""What stands at the two ends of a model: rows of a table for tokens or positions, and the head that makes logits."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.dense_products import head_product
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.model.initializers import matrix_init
from hybridnorm_jax.model.layer_scale import StoredScale


class Embedding(nn.Module):
    """scale * the rows of a learned table.

    Parameters: `embedding` (rows, embed).

    Attributes:
      rows, width: of the table.
      std, initializer: as those of initializers.matrix_init.
      dtype, param_dtype: of the result and of the table.
      scale: factor of the rows; None: 1. It is rounded to `dtype` and so is the product, as in transformers' Gemma: in
        bfloat16 sqrt(3072) = 55.43 is 55.5.
    """

    rows: int
    width: int
    std: float | Array
    dtype: str
    param_dtype: str
    scale: float | None = None
    initializer: str = "normal"

    def setup(self) -> None:
        init = matrix_init(self.initializer, self.std, writes=True)
        self.embedding = self.param("embedding", init, (self.rows, self.width), jnp.dtype(self.param_dtype))

    def __call__(
        self, ids: Int[Array, "batch seq"], rows: Float[Array, "batch seq embed"] | None = None
    ) -> Float[Array, "batch seq embed"]:
        """Look the rows up; an id outside the table gives NaN. The gradient is summed in the parameters' dtype.

        Args:
          rows: those of the table, in `dtype`, where they are looked up already.
        """
        if rows is None:
            rows = self._rows(ids)
        return rows if self.scale is None else rows * jnp.asarray(self.scale, rows.dtype)

    def _rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        # JAX would count a negative id from the table's end.
        ids = jnp.where(ids < 0, self.rows, ids)
        # Gathered along embed before the lookup: XLA cannot get from a result sharded by embed to one sharded by batch.
        table = nn.with_logical_constraint(self.embedding, ("vocab", None))
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class EmbeddingScale(nn.Module):
    """scale * x, one learned number for the whole embedding, as the models of DyT (2503.10622) have it.

    Parameters: `scale` (1,), which starts at sqrt(start_width). The product is formed in float32 at least.
    """

    start_width: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        init = nn.initializers.constant(math.sqrt(self.start_width))
        scale = self.param("scale", init, (1,), self.param_dtype)
        wide = widened(x)
        return (scale.astype(wide.dtype) * wide).astype(x.dtype)


class Head(nn.Module):
    """cap * tanh(scale * s * (hidden @ kernel + bias) / cap), in float32 at least.

    Parameters: `kernel` (embed, vocab), none where the head is tied; `bias` (vocab,) and `scales/scale` (vocab,), of
    which s is made, where asked for.

    Attributes:
      vocab_size: number of logits.
      std, initializer: of the kernel, as those of initializers.matrix_init.
      use_bias: whether there is a bias.
      param_dtype: of the parameters.
      scale: factor of the logits (Cohere; Granite divides by its inverse); None: 1.
      learned_scales: whether s is there, a learned number for each logit: s_z of nGPT (2410.01131), which starts at 1.
      cap: the logits lie between -cap and cap (Gemma 2, 2408.00118); None: they are not capped.
    """

    vocab_size: int
    std: float | Array
    use_bias: bool
    param_dtype: str
    scale: float | None = None
    learned_scales: bool = False
    cap: float | None = None
    initializer: str = "normal"

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch seq embed"], tied: Float[Array, "vocab embed"] | None = None
    ) -> Float[Array, "batch seq vocab"]:
        """`tied`: the token embedding, where it is also the head."""
        accumulate, dtype = jnp.promote_types(hidden.dtype, jnp.float32), jnp.dtype(self.param_dtype)
        if tied is not None:
            kernel, contracted = tied, ((2,), (1,))
        else:
            shape = (hidden.shape[-1], self.vocab_size)
            kernel = self.param("kernel", matrix_init(self.initializer, self.std, writes=False), shape, dtype)
            contracted = ((2,), (0,))
        logits = head_product(hidden, kernel, (contracted, ((), ())))
        if self.use_bias:
            logits += self.param("bias", nn.initializers.zeros, (self.vocab_size,), dtype).astype(accumulate)
        if self.learned_scales:
            stored = StoredScale(1.0, 1 / math.sqrt(hidden.shape[-1]), dtype, name="scales")
            logits *= stored(self.vocab_size).astype(accumulate)
        if self.scale is not None:
            logits *= jnp.asarray(self.scale, accumulate)
        if self.cap is not None:
            cap = jnp.asarray(self.cap, accumulate)
            logits = cap * jnp.tanh(logits / cap)
        return logits
