"""Next-token cross-entropy, whole or in chunks of the sequence, with z-loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.kernels.token_logits import TokenLogits, token_logits
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.decoder import Decoder


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


# (the head's parameters, what the head reads, targets) -> what the loss reads of each token's logits.
TokenLogitsOf = Callable[[Any, Float[Array, "batch seq embed"], Int[Array, "batch seq"]], TokenLogits]


def token_logits_of(model: Decoder, kernel: str = "xla") -> TokenLogitsOf:
    """What computes it for this model, in float32 at least.

    The function closes over no array. The head's parameters are those of `gathered_head`, or for another kernel than
    xla those of `kernel_head`.

    Args:
      kernel: one of backend_names.LOSS_KERNELS. pallas is for a head without parameters besides its table, see
        model.config.more_than_head_table, and for devices that do not split the vocabulary.
    """

    def from_logits(head: Any, hidden: Array, targets: Array) -> TokenLogits:
        logits: Any = model.apply({"params": head}, hidden, method="logits")
        return token_logits(logits, targets)

    def from_hidden(head: Any, hidden: Array, targets: Array) -> TokenLogits:
        from hybridnorm_jax.kernels.tpu_head import Form, head_token_logits  # imports Pallas, which takes a while

        config = model.config
        form = Form(vocab_first=config.tie_embeddings, scale=config.logit_scale, cap=config.logit_cap)
        return head_token_logits(hidden, head, targets, form=form)

    return from_logits if kernel == "xla" else from_hidden


def cross_entropy(found: TokenLogits, weights: Float[Array, "batch seq"]) -> LossSums:
    """Sums of weights * (log Z - logits[target]) and weights * (log Z)^2, Z = sum exp(logits), in the dtype of Z."""
    log_z, chosen = found
    weights = weights.astype(log_z.dtype)
    return LossSums(
        nll=jnp.sum(weights * (log_z - chosen)),
        z=jnp.sum(weights * jnp.square(log_z)),
        weight=jnp.sum(weights),
    )


def chunked_cross_entropy(
    logits_of: TokenLogitsOf,
    head: Any,
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    *,
    chunk: int,
    stretches: int = 1,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], LossSums]:
    """(nll + z_loss * z, sums) of cross_entropy(logits_of(head, hidden, targets), weights), a chunk at a time.

    With 100,000 tokens of vocabulary, 4 sequences of 4096 would at once hold 6.6 GB of float32 logits, and their
    gradient. The gradient of a chunk is formed where its logits are, in the forward pass: so they are computed once.

    Only the first result has a gradient, with respect to head and hidden.

    Args:
      logits_of: as of token_logits_of; closes over no array that depends on a parameter.
      head: its parameters.
      chunk: positions per chunk; divides seq.
      stretches: into how many stretches devices split the sequence; every chunk takes an equal piece of each, so that
        all devices work on every chunk. Divides chunk.
      z_loss: weight of the sum z.
    """
    targets, weights = (in_chunks(x, chunk, stretches) for x in (targets, weights))
    total, sums = _sum_of_chunks(logits_of, z_loss, head, in_chunks(hidden, chunk, stretches), targets, weights)
    return total, jax.lax.stop_gradient(sums)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_chunks(
    logits_of: TokenLogitsOf,
    z_loss: float,
    head: Any,
    hidden: Float[Array, "chunks batch chunk embed"],
    targets: Int[Array, "chunks batch chunk"],
    weights: Float[Array, "chunks batch chunk"],
) -> tuple[Float[Array, ""], LossSums]:
    def add(sums: LossSums, piece: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, weights = piece
        return sums + cross_entropy(logits_of(head, hidden, targets), weights), None

    zero = LossSums.zero(wide_dtype(hidden.dtype))
    sums, _ = jax.lax.scan(add, zero, (hidden, targets, weights))
    return sums.nll + z_loss * sums.z, sums


def _with_gradient(
    logits_of: TokenLogitsOf,
    z_loss: float,
    head: Any,
    hidden: Float[Array, "chunks batch chunk embed"],
    targets: Int[Array, "chunks batch chunk"],
    weights: Float[Array, "chunks batch chunk"],
) -> tuple[tuple[Float[Array, ""], LossSums], tuple[Any, Array, Array]]:
    """_sum_of_chunks, and its gradient with respect to head and hidden, with the weights."""

    def total_of(head: Any, hidden: Array, targets: Array, weights: Array) -> tuple[Array, LossSums]:
        sums = cross_entropy(logits_of(head, hidden, targets), weights)
        return sums.nll + z_loss * sums.z, sums

    def add(carry: tuple[LossSums, Any], piece: tuple[Array, Array, Array]) -> tuple[tuple[LossSums, Any], Array]:
        sums, of_head = carry
        (_, more), (of_chunk, of_hidden) = jax.value_and_grad(total_of, (0, 1), has_aux=True)(head, *piece)
        return (sums + more, jax.tree.map(jnp.add, of_head, of_chunk)), of_hidden

    start = LossSums.zero(wide_dtype(hidden.dtype)), jax.tree.map(jnp.zeros_like, head)
    (sums, of_head), of_hidden = jax.lax.scan(add, start, (hidden, targets, weights))
    return (sums.nll + z_loss * sums.z, sums), (of_head, of_hidden, weights)


def _pull_back(
    logits_of: TokenLogitsOf, z_loss: float, kept: tuple[Any, Array, Array], cotangents: Any
) -> tuple[Any, Array, None, Array]:
    of_head, of_hidden, weights = kept
    times, _ = cotangents
    of_head, of_hidden = jax.tree.map(lambda leaf: times.astype(leaf.dtype) * leaf, (of_head, of_hidden))
    return of_head, of_hidden, None, jnp.zeros_like(weights)


_sum_of_chunks.defvjp(_with_gradient, _pull_back)


def in_chunks(
    x: Shaped[Array, "batch seq ..."], chunk: int, stretches: int = 1
) -> Shaped[Array, "chunks batch chunk ..."]:
    """The positions in chunks; `chunk` and `stretches` as in chunked_cross_entropy."""
    batch, seq = x.shape[:2]
    if seq % chunk or chunk % stretches:
        raise ValueError(f"chunk={chunk} must divide the sequence length {seq}, stretches={stretches} the chunk")
    pieces = jnp.moveaxis(x.reshape(batch, stretches, seq // chunk, chunk // stretches, *x.shape[2:]), 2, 0)
    return pieces.reshape(seq // chunk, batch, chunk, *x.shape[2:])


def gathered_head(config: ModelConfig, params: Any) -> Any:
    """Those of a decoder's parameters that its method `logits` reads.

    The large one is gathered (and its gradient reduced) once, and not in each chunk.
    """
    module, name, axes = _table(config)
    head = {part: params[part] for part in ("token_embedding", "head") if part in (module, "head") and part in params}
    gathered = nn.with_logical_constraint(params[module][name], axes)
    return head | {module: params[module] | {name: gathered}}


def kernel_head(config: ModelConfig, head: Any, tokens: Int[Array, "batch seq"]) -> tuple[Any, Array | None]:
    """Of gathered_head's parameters what the kernels take, and where the table is tied the embedding's rows of it."""
    from hybridnorm_jax.kernels.tpu_head import head_table, head_table_and_rows  # imports Pallas

    module, name, _ = _table(config)
    if config.tie_embeddings:
        return head_table_and_rows(head[module][name], tokens, dtype=config.dtype)
    return head_table(head[module][name], tokens, dtype=config.dtype), None


def _table(config: ModelConfig) -> tuple[str, str, tuple[str | None, str | None]]:
    """The module and the name of the parameter that the head multiplies with, and its logical axes when gathered."""
    if config.tie_embeddings:
        return "token_embedding", "embedding", ("vocab", None)
    return "head", "kernel", (None, "vocab")
