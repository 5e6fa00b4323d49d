"""ALiBi: positions as a slope for each head, by which the scores of far keys fall (2108.12409)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.kernels.score_rules import Alibi
from hybridnorm_jax.model.config_attention import AttentionKeys


@dataclasses.dataclass(frozen=True)
class AlibiKind:
    """Which ALiBi a model has; see the keys alibi_max, alibi_scale and alibi_bfloat16 of the configuration."""

    largest: float = 8.0
    scale: float = 1.0
    in_bfloat16: bool = False

    def rule(self, num_heads: int, dtype: Any, positions: Int[Array, "batch seq"]) -> Alibi:
        """What is added to the scores of heads of this dtype.

        Args:
          positions: of each key in its document.
        """
        slopes = jnp.asarray(alibi_slopes(num_heads, self.largest), wide_dtype(dtype))
        return Alibi(slopes=slopes, scale=self.scale, key_positions=positions if self.in_bfloat16 else None)


def alibi_of(config: AttentionKeys) -> AlibiKind | None:
    """The ALiBi of a model; None where it knows positions otherwise."""
    if config.positions != "alibi":
        return None
    return AlibiKind(largest=config.alibi_max, scale=config.alibi_scale, in_bfloat16=config.alibi_bfloat16)


def alibi_slopes(num_heads: int, largest: float = 8.0) -> np.ndarray:
    """The slope of each head, in float64.

    For a power of two of heads 2^(-largest h / heads), h = 1, 2, ... Otherwise those of the next lower power of two
    first, and then every other one, from the first, of twice as many heads.
    """
    power = 1 << (num_heads.bit_length() - 1)
    first = 2.0 ** (-largest * np.arange(1, power + 1) / power)
    others = 2.0 ** (-largest * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([first, others])[:num_heads]
