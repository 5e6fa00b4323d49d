"""What is said of the signal on its way through the layers, as pure functions of one layer's arrays.

Block, Decoder and Attention compute it where asked: values are sown into the collection SIGNAL where that is mutable;
the gradient's square sum comes out as the gradient with respect to the collection PROBE where that is given. Nothing
is computed otherwise. training/layer_measures.py asks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# SIGNAL holds stream_rms and token_similarity after the embedding and after every block, attention_entropy and
# largest_logit in every attention. PROBE holds "square", a zero, for the same places as the first two.
SIGNAL, PROBE = "signal", "gradient_probe"


def stream_rms(stream: Float[Array, "batch seq embed"]) -> Float[Array, ""]:
    """sqrt(mean x^2) over batch, positions and channels, in float32 at least."""
    return jnp.sqrt(jnp.square(_wide(stream)).mean())


def token_similarity(stream: Float[Array, "batch seq embed"]) -> Float[Array, ""]:
    """Mean cosine similarity of two different positions of a sequence, over all pairs, then over the batch.

    With u_i = x_i / |x_i| over n positions: (|sum_i u_i|^2 - sum_i |u_i|^2) / (n (n - 1)); 1 where all tokens point one
    way, NaN for sequences of one position. Segments are not told apart. HybridNorm (2503.04598), fig. 8, shows such a
    similarity without defining it.
    """
    wide = _wide(stream)
    length = jnp.sqrt(jnp.square(wide).sum(-1, keepdims=True))
    units = wide / jnp.where(length > 0, length, 1)
    pairs = jnp.square(units.sum(1)).sum(-1) - jnp.square(units).sum((1, 2))
    positions = stream.shape[1]
    return (pairs / (positions * (positions - 1))).mean() if positions > 1 else jnp.full((), jnp.nan, wide.dtype)


@jax.custom_vjp
def gradient_probe(x: Array, square: Float[Array, ""]) -> Array:
    """x; the gradient with respect to `square` is the sum of squares of that with respect to x, in square's dtype."""
    return x


def _probe_forward(x: Array, square: Float[Array, ""]) -> tuple[Array, Float[Array, ""]]:
    return x, square


def _probe_backward(square: Float[Array, ""], gradient: Array) -> tuple[Array, Float[Array, ""]]:
    return gradient, jnp.square(gradient.astype(square.dtype)).sum()


gradient_probe.defvjp(_probe_forward, _probe_backward)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
