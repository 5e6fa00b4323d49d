"""Next-token cross-entropy, whole or in chunks of the sequence, with z-loss."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from hybridnorm_jax.model.config import ModelConfig


@flax.struct.dataclass
class LossSums:
    """Sums over tokens, to be divided once by `weight`: means of means are wrong where token counts differ.

    Attributes:
      nll: sum of weights * negative log-likelihood, in nats.
      z: sum of weights * log(Z)^2, Z the normalizer of the softmax.
      weight: sum of weights, the number of targets where weights are 0 or 1.
    """

    nll: Float[Array, ""]
    z: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)

    @classmethod
    def zero(cls, dtype: Any = jnp.float32) -> "LossSums":
        """The sums over no token."""
        zero = jnp.zeros((), dtype)
        return cls(nll=zero, z=zero, weight=zero)


def cross_entropy(
    logits: Float[Array, "batch seq vocab"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
) -> LossSums:
    """Sums of weights * (log Z - logits[target]) and weights * (log Z)^2, Z = sum exp(logits), in float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    weights = weights.astype(logits.dtype)
    return LossSums(
        nll=jnp.sum(weights * (log_z - chosen)),
        z=jnp.sum(weights * jnp.square(log_z)),
        weight=jnp.sum(weights),
    )


def chunked_cross_entropy(
    logits_of: Callable[[Float[Array, "batch chunk embed"]], Float[Array, "batch chunk vocab"]],
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    chunk: int,
    stretches: int = 1,
) -> LossSums:
    """cross_entropy(logits_of(hidden), ...) that holds the logits of `chunk` positions at a time.

    The backward pass computes each chunk's logits once more. With 100,000 tokens of vocabulary, 4 sequences of 4096
    would otherwise hold 6.6 GB of float32 logits, and their gradient.

    Args:
      chunk: positions per chunk; divides seq.
      stretches: into how many stretches devices split the sequence; every chunk takes an equal piece of each, so that
        all devices work on every chunk. Divides chunk.
    """

    @jax.checkpoint
    def body(sums: LossSums, piece: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, weights = piece
        return sums + cross_entropy(logits_of(hidden), targets, weights), None

    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    pieces = tuple(in_chunks(x, chunk, stretches) for x in (hidden, targets, weights))
    sums, _ = jax.lax.scan(body, LossSums.zero(dtype), pieces)
    return sums


def in_chunks(
    x: Shaped[Array, "batch seq ..."], chunk: int, stretches: int = 1
) -> Shaped[Array, "chunks batch chunk ..."]:
    """The positions in chunks; `chunk` and `stretches` as in chunked_cross_entropy."""
    batch, seq = x.shape[:2]
    if seq % chunk or chunk % stretches:
        raise ValueError(f"chunk={chunk} must divide the sequence length {seq}, stretches={stretches} the chunk")
    pieces = jnp.moveaxis(x.reshape(batch, stretches, seq // chunk, chunk // stretches, *x.shape[2:]), 2, 0)
    return pieces.reshape(seq // chunk, batch, chunk, *x.shape[2:])


def with_head_gathered(config: ModelConfig, params: Any) -> Any:
    """A decoder's parameters, those of the head gathered (and their gradient reduced) once instead of in each chunk."""
    axes: tuple[str | None, str | None]
    module, name, axes = "head", "kernel", (None, "vocab")
    if config.tie_embeddings:
        module, name, axes = "token_embedding", "embedding", ("vocab", None)
    gathered = nn.with_logical_constraint(params[module][name], axes)
    return params | {module: params[module] | {name: gathered}}
