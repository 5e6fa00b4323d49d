"""What the loss reads of each token's logits: the logarithm of the softmax's denominator, and the target's logit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.dense_products import traced_platform
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.mesh.split_axes import split_axes

Logits = Float[Array, "batch seq vocab"]
PerToken = Float[Array, "batch seq"]


class TokenLogits(NamedTuple):
    """Of each token.

    Attributes:
      log_z: log sum exp(logits).
      chosen: the logit of the target.
    """

    log_z: PerToken
    chosen: PerToken


def token_logits(logits: Logits, targets: Int[Array, "batch seq"]) -> TokenLogits:
    """Both, in float32 at least, whatever the dtype of the logits.

    On a GPU they are read from memory once for it, and not three times: one reduction keeps the highest logit and the
    sum of exponentials together, and the target's logit is gathered. A TPU sums faster than it gathers, and XLA for
    TPUs makes few passes of the plain formula by itself. Where devices split the vocabulary, the plain formula lets
    XLA reduce over them.
    """
    logits = widened(logits)
    if traced_platform() == "gpu" and not split_axes("vocab", logits.shape[-1]):
        return _in_one_pass(logits, targets)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Not gathered: a TPU would keep the logits in memory for it. The sum is taken beside that of the exponentials.
    return TokenLogits(log_z, jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1))


@jax.custom_vjp
def _in_one_pass(logits: Logits, targets: Int[Array, "batch seq"]) -> TokenLogits:
    lowest = jnp.finfo(logits.dtype).min  # and not -inf, of which two have no difference
    start = jnp.asarray(lowest, logits.dtype), jnp.zeros((), logits.dtype)
    highest, total = jax.lax.reduce((logits, jnp.ones_like(logits)), start, _add, (logits.ndim - 1,))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return TokenLogits(highest + jnp.log(total), chosen)


def _add(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """(m, sum exp(x - m)) of two sets of logits together, m the highest of a set."""
    highest = jnp.maximum(one[0], other[0])
    return highest, one[1] * jnp.exp(one[0] - highest) + other[1] * jnp.exp(other[0] - highest)


def _forward(logits: Logits, targets: Int[Array, "batch seq"]) -> tuple[TokenLogits, tuple[Array, Array, Array]]:
    found = _in_one_pass(logits, targets)
    return found, (logits, targets, found.log_z)


def _backward(kept: tuple[Array, Array, Array], gradient: TokenLogits) -> tuple[Logits, None]:
    logits, targets, log_z = kept
    of_log_z = gradient.log_z[..., None] * jnp.exp(logits - log_z[..., None])
    return of_log_z + jnp.where(_is_target(logits, targets), gradient.chosen[..., None], 0), None


_in_one_pass.defvjp(_forward, _backward)


def _is_target(logits: Logits, targets: Int[Array, "batch seq"]) -> Array:
    return targets[..., None] == jnp.arange(logits.shape[-1])
