"""RoPE's angles: the wavelengths of a model, stretched for longer texts as its keys say, and its layers' rotations.

What turns heads by them is kernels/head_preparation.py.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.kernels.head_preparation import Rotation
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.model.config_attention import FIRST_ROTATION, NO_ROTATION, SECOND_ROTATION, AttentionKeys

# The wavelength of each pair of channels, over 2 pi: a pair turns by position / wavelength.
Wavelengths = Float[np.ndarray, " half"]


def default_positions(seq: int) -> Int[Array, "1 seq"]:
    """0, 1, ... for every sequence of a batch."""
    return jnp.arange(seq)[None]


def rotation(positions: Int[Array, "batch seq"], rotary_dim: int, theta: float, dtype: Any = jnp.float32) -> Rotation:
    """cos and sin of positions * theta^(-2i / rotary_dim), i < rotary_dim / 2, one for all heads.

    Source: RoPE (2104.09864). At least float32: at position 1e5 bfloat16 has no fraction left.
    """
    dtype = wide_dtype(dtype)
    wavelengths = theta ** (jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
    angles = positions[:, :, None, None].astype(dtype) / wavelengths
    return jnp.cos(angles), jnp.sin(angles)


def rotations(config: AttentionKeys, positions: Int[Array, "batch seq"], dtype: Any) -> dict[int, Rotation]:
    """The rotation of each kind that layers of this model have, see config.layer_rotations.

    Args:
      dtype: of the heads.
    """
    found: dict[int, Rotation] = {}
    for kind in sorted(set(config.layer_rotations) - {NO_ROTATION}):
        if kind == SECOND_ROTATION:
            found[kind] = rotation(positions, config.rotary_width, present(config.second_rope_theta), dtype)
        elif config.rope_scaling == "none":
            found[FIRST_ROTATION] = rotation(positions, config.rotary_width, config.rope_theta, dtype)
        else:
            found[FIRST_ROTATION] = _stretched_rotation(config, positions, dtype)
    return found


def stacked(by_kind: dict[int, Rotation], kinds: list[int]) -> Rotation:
    """The rotations of these kinds, each a place of a new first axis; to rotate by NO_ROTATION changes nothing."""
    cos, sin = next(iter(by_kind.values()))
    all_of_them = by_kind | {NO_ROTATION: (jnp.ones_like(cos), jnp.zeros_like(sin))}
    chosen = [all_of_them[kind] for kind in kinds]
    return jnp.stack([cos for cos, _ in chosen]), jnp.stack([sin for _, sin in chosen])


class Stretched(NamedTuple):
    """What a rule of scaling makes of a rotation.

    Attributes:
      wavelengths: of each pair.
      long: in their place in a text longer than config.rope_original_length; None: the same.
      factor: of cos and sin.
    """

    wavelengths: Wavelengths
    long: Wavelengths | None = None
    factor: float = 1.0


def stretched(config: AttentionKeys) -> Stretched:
    """The rotation by rope_theta after rope_scaling, in float64."""
    plain = config.rope_theta ** (np.arange(0, config.rotary_width, 2) / config.rotary_width)
    match config.rope_scaling:
        case "linear":
            return Stretched(plain * config.rope_factor)
        case "llama3":
            return Stretched(_llama3(config, plain))
        case "yarn":
            return Stretched(_yarn(config, plain), factor=_yarn_factor(config))
        case "longrope":
            short, long = plain * config.rope_short_factors, plain * config.rope_long_factors
            return Stretched(short, long=long, factor=_longrope_factor(config))
    return Stretched(plain)


def _stretched_rotation(config: AttentionKeys, positions: Int[Array, "batch seq"], dtype: Any) -> Rotation:
    dtype, rule = wide_dtype(dtype), stretched(config)
    wavelengths = jnp.asarray(rule.wavelengths, dtype)
    if rule.long is not None:
        # Of each sequence its largest position, so that none depends on those beside it.
        is_long = positions.max(axis=1)[:, None, None, None] >= present(config.rope_original_length)
        wavelengths = jnp.where(is_long, jnp.asarray(rule.long, dtype), wavelengths)
    angles = positions[:, :, None, None].astype(dtype) / wavelengths
    return rule.factor * jnp.cos(angles), rule.factor * jnp.sin(angles)


def _llama3(config: AttentionKeys, plain: Wavelengths) -> Wavelengths:
    """Waves that turn often within the original length stay, those that turn seldom are stretched, a blend between.

    With r the turns of a wave within rope_original_length and (low, high) = rope_bounds: for r <= low the frequency is
    divided by rope_factor, for r >= high it stays, and between it is (1 - w) / rope_factor + w times what it was, where
    w = (r - low) / (high - low). Source: the released code of Llama 3.1 (2407.21783).
    """
    low, high = config.rope_bounds
    turns = present(config.rope_original_length) / (2 * math.pi * plain)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain / ((1 - kept) / config.rope_factor + kept)


def _yarn(config: AttentionKeys, plain: Wavelengths) -> Wavelengths:
    """As llama3, but the blend is linear in the number of the pair. Source: YaRN (2309.00071), section 3.2.

    The pair that turns n times within rope_original_length L has the number
    c(n) = rotary_dim ln(L / (2 pi n)) / (2 ln theta). Pairs up to c(beta_fast) stay, and from c(beta_slow) on their
    frequency is divided by rope_factor; (beta_slow, beta_fast) = rope_bounds. The two are rounded away from each other
    with rope_truncate.
    """
    slow, fast = config.rope_bounds
    width, length = config.rotary_width, present(config.rope_original_length)

    def pair_of(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_of(fast), pair_of(slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    # As in the released code, where the two are the same.
    last = last + 0.001 if first == last else last
    kept = 1 - np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    return plain / ((1 - kept) / config.rope_factor + kept)


def _yarn_factor(config: AttentionKeys) -> float:
    """0.1 ln(rope_factor) + 1: YaRN, eq. 22, which is for the scores, is the square of it."""
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return 0.1 * math.log(config.rope_factor) + 1


def _longrope_factor(config: AttentionKeys) -> float:
    """sqrt(1 + ln(rope_factor) / ln(rope_original_length)). Source: LongRoPE (2402.13753) in Phi-3's released code."""
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return math.sqrt(1 + math.log(config.rope_factor) / math.log(present(config.rope_original_length)))
