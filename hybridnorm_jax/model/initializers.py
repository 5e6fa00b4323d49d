"""How weights start: one truncated normal, and by what each initializer scales it for each kind of matrix."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hybridnorm_jax.kernels.precision import wide_dtype

# "output" writes the residual stream (W_O, FFN-out); "value" is W_V; "feed_forward" is the FFN's gate, and "up" what
# it multiplies, or an FFN's one projection without a gate; "input" is every other weight inside a block (W_Q, W_K);
# "outer" stands outside the blocks (embeddings, head).
ROLES = ("input", "value", "feed_forward", "up", "output", "outer")


def truncated_normal(std: float | Array) -> Callable[..., Array]:
    """Initializer: N(0, std^2) cut at 3 std, not rescaled (HybridNorm 2503.04598; its code's cutoff factor).

    Drawn in float32 at least and rounded once: a normal distribution drawn in bfloat16 has 128 values and no tails.
    The initializer can be pickled, and so can modules that have it.
    """
    return functools.partial(_draw_truncated_normal, std=std)


def _draw_truncated_normal(key: Array, shape: Sequence[int], dtype: Any = float, *, std: float | Array) -> Array:
    wide = wide_dtype(dtype)
    drawn = jax.random.truncated_normal(key, -3, 3, shape, wide) * jnp.asarray(std, wide)
    return drawn.astype(dtype)


def matrix_init(initializer: str, std: float | Array, *, writes: bool) -> Callable[..., Array]:
    """Initializer of a matrix: truncated_normal(std), with "ngpt" divided by the lengths of its vectors along embed.

    Args:
      writes: whether embed is the last axis, as of a table or of what writes the stream, and not the one before it.
    """
    if initializer != "ngpt":
        return truncated_normal(std)
    return functools.partial(_draw_unit_vectors, std=std, axis=-1 if writes else -2)


def _draw_unit_vectors(key: Array, shape: Sequence[int], dtype: Any = float, *, std: float | Array, axis: int) -> Array:
    wide = wide_dtype(dtype)
    drawn = _draw_truncated_normal(key, shape, wide, std=std)
    return (drawn / jnp.linalg.norm(drawn, axis=axis, keepdims=True)).astype(dtype)


def std_factor(initializer: str, role: str, layer: int | Array, num_layers: int) -> float | Array:
    """What `model.init_std` is multiplied with. `layer` counts from 0 and may be traced: L blocks, l = layer + 1.

    normal        1 everywhere (HybridNorm, "Normal initialization")
    depth_scaled  output: 1/sqrt(2l) (HybridNorm, "Depth-Scaled")
    megatron      output: 1/sqrt(2L) (HybridNorm, "Megatron")
    deepnorm      value, feed_forward, up and output: (8L)^(-1/4) (DeepNorm 2203.00555, decoder-only)
    sub_ln        value, feed_forward, up and output: sqrt(ln 2L) (Sub-LN 2210.06423, decoder-only)
    b2t           every weight inside a block: 1/sqrt(L) (B2T 2206.00330); embeddings and head: 1
    ngpt          1 everywhere; matrix_init then makes unit vectors along embed (nGPT 2410.01131)
    simple_gpt    up and output: 1/sqrt(2l) (SimpleNorm 2602.01212); for the two ends of a decoder see `end_std`
    """
    if role not in ROLES:
        raise ValueError(f"role={role!r} must be one of {ROLES}")
    match initializer, role:
        case "normal" | "ngpt", _:
            return 1.0
        case "depth_scaled", "output":
            return (2.0 * (layer + 1)) ** -0.5
        case "megatron", "output":
            return 1 / math.sqrt(2 * num_layers)
        case "deepnorm", "value" | "feed_forward" | "up" | "output":
            return (8 * num_layers) ** -0.25
        case "sub_ln", "value" | "feed_forward" | "up" | "output":
            return math.sqrt(math.log(2 * num_layers))
        case "b2t", "input" | "value" | "feed_forward" | "up" | "output":
            return 1 / math.sqrt(num_layers)
        case "simple_gpt", "up" | "output":
            return (2.0 * (layer + 1)) ** -0.5
        case "depth_scaled" | "megatron" | "deepnorm" | "sub_ln" | "b2t" | "simple_gpt", _:
            return 1.0
    raise ValueError(f"initializer={initializer!r} is not known")


def end_std(initializer: str, end: Literal["embedding", "head"], *, init_std: float, width: int) -> float:
    """The standard deviation of a decoder's embeddings, or of its head's matrix: init_std.

    With simple_gpt it is 1 of embeddings and 1/sqrt(width) of the head, whatever init_std is, as in the authors' code
    (Ocram7/SimpleGPT, simplegpt_model.py). A tied table, which they do not have, starts as a head.
    """
    if initializer == "simple_gpt":
        return 1.0 if end == "embedding" else width**-0.5
    return init_std * float(std_factor(initializer, "outer", 0, 1))
