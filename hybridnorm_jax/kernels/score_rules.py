"""What attention makes of the products of queries and keys: scale, cap, who sees whom, and what is added.

    z = scale * q k^T,  capped: z = cap * tanh(z / cap),  then + ALiBi, -inf where a query does not see a key

and the softmax over the keys that a query sees, with one more term exp(sink) in its denominator where there are sinks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.kernels.backend_names import features_of
from hybridnorm_jax.kernels.precision import wide_dtype

# An array of places in the sequence that broadcasts against scores; so for keys' places and positions.
Places = Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["slopes", "key_positions"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class Alibi:
    """What ALiBi adds to the scores: scale * slope * (place of the key - place of the query). They have no gradient.

    Attributes:
      slopes: of each head, in float32 at least.
      scale: a factor.
      key_positions: None, or of each key its position in its document. Then what is added is scale * slope * position,
        slope, position and their product each rounded to bfloat16. The softmax does not see the difference that is the
        same for all keys of a query, but it sees the rounding.
    """

    slopes: Float[Array, " heads"]
    scale: float = 1.0
    key_positions: Int[Array, "batch keys"] | None = None

    def added(self, shape: tuple[int, ...], *, query: Places, key: Places, key_position: Places = None) -> Array:
        """What is added to scores.

        Args:
          shape: of the slopes, so that they broadcast against the scores.
          query, key: places in the sequence.
          key_position: of key_positions what belongs to these keys.
        """
        slopes = self.slopes.reshape(shape)
        if self.key_positions is None:
            return (self.scale * slopes) * (key - query).astype(slopes.dtype)
        rounded = slopes.astype(jnp.bfloat16) * key_position.astype(jnp.bfloat16)
        return self.scale * _as_rounded(rounded).astype(slopes.dtype)


def _as_rounded(x: Array) -> Array:
    """x, and XLA leaves its rounding alone."""
    finfo = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, exponent_bits=finfo.nexp, mantissa_bits=finfo.nmant)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layer_window", "sinks", "alibi"],
    meta_fields=["scale", "cap", "causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class ScoreRules:
    """What attention makes of the products of queries and keys. By itself: plain causal attention.

    Attributes:
      scale: factor of the products; None: 1 / sqrt(head_dim).
      cap: scores z become cap * tanh(z / cap); None: they stay.
      causal: a query sees no later key.
      window: a query sees keys nearer than this, itself counted: the distance is less than `window`. None: all. Blocks
        that nobody sees are not computed.
      layer_window: the same as an array, where it is not known before the program runs; nothing is left out then.
      sinks: of each head the score of one more key, whose value is zero.
      alibi: what is added to the scores.
    """

    scale: float | None = None
    cap: float | None = None
    causal: bool = True
    window: int | None = None
    layer_window: Int[Array, ""] | None = None
    sinks: Float[Array, " heads"] | None = None
    alibi: Alibi | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """What a kernel must be able to do besides causal attention, by the names of FEATURES."""
        windowed = self.window is not None or self.layer_window is not None
        return features_of(
            causal=self.causal,
            windows=windowed,
            cap=self.cap is not None,
            sinks=self.sinks is not None,
            alibi=self.alibi is not None,
        )

    def scale_of(self, head_dim: int) -> float:
        """The factor of the products of heads of this width."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def capped(self, scores: Array) -> Array:
        """cap * tanh(scores / cap)."""
        return scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)

    def through_cap(self, d_capped: Array, capped: Array) -> Array:
        """The gradient of scores from that of the capped ones."""
        return d_capped if self.cap is None else d_capped * (1 - jnp.square(capped / self.cap))

    def visible(self, query: Places, key: Places) -> Bool[Array, "..."] | None:
        """Whether the query at one place sees the key at another; None: every query sees every key."""
        seen = query >= key if self.causal else None
        for window in (self.window, self.layer_window):
            if window is None:
                continue
            near = query - key < window
            if not self.causal:
                near = near & (key - query < window)
            seen = near if seen is None else seen & near
        return seen

    def within(self, seq: int) -> "ScoreRules":
        """These rules for a sequence of this length: a window that hides nothing of it is none."""
        hides = self.window is not None and self.window < seq
        return self if hides else dataclasses.replace(self, window=None)

    def sinks_in(self, dtype: Any, shape: tuple[int, ...]) -> Array:
        """The sinks in at least this dtype's wide_dtype, of a shape that broadcasts."""
        assert self.sinks is not None
        return self.sinks.astype(wide_dtype(dtype)).reshape(shape)

    def gradient(self, d_sinks: Array | None) -> "ScoreRules":
        """What jax.custom_vjp takes as the gradient of these rules: the sinks alone have one."""
        return dataclasses.replace(self, layer_window=None, alibi=None, sinks=d_sinks)


# Plain causal attention.
PLAIN = ScoreRules()
