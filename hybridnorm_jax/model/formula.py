"""The formula of every sublayer, and its numbers as arrays: scales, and where learned scales start."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.precision import wide_dtype, widened
from hybridnorm_jax.model.norm_functions import unit
from hybridnorm_jax.model.placement import Scales, Starts, SublayerPlacement

Stream = Float[Array, "batch seq embed"]
StreamFunction = Callable[[Stream], Stream]
ScaleArrays = Scales[Float[Array, ""] | None]  # None where the scale is 1
StartArrays = Starts[Float[Array, ""] | None]  # None where the learned scale starts at 1


class Streams(NamedTuple):
    """What goes from layer to layer.

    Attributes:
      main: the residual stream.
      side: the side stream, where the scheme has one.
    """

    main: Stream
    side: Stream | None = None


ALL_ONE: StartArrays = Starts(pre=None, branch=None, layer_scale=None)


class SublayerNorms(NamedTuple):
    """The norms of the formula and its learned scales, each the identity where the placement has none.

    Attributes:
      pre, post: the norms.
      branch: the norm.
      layer_scale: the learned scale g behind it.
      residual: the learned scale w.
      entry: the norm at the entrance.
      side: the norm of the side stream.
      own: the norm, or learned scale, of what is read beside the side stream.
    """

    pre: StreamFunction
    branch: StreamFunction
    layer_scale: StreamFunction
    post: StreamFunction
    residual: StreamFunction
    entry: StreamFunction
    side: StreamFunction
    own: StreamFunction


def apply_formula(
    f: StreamFunction,
    sublayer_input: Streams,
    block_input: Stream,
    placement: SublayerPlacement,
    norms: SublayerNorms,
    scales: ScaleArrays,
) -> Streams:
    """y = post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x)))): every sublayer of every scheme.

    Where the placement has learned scales, r is w * r, and branch is g * branch. In the place of the sum stands what
    placement.joins says. Where it has a side stream s, that
    becomes s + side_scale * branch(...), and where the branch reads it, x is own(x) + N(s).
    """
    entered, side = norms.entry(sublayer_input.main), sublayer_input.side
    x = block_input if placement.reads == "block" else entered
    if placement.side == "read" and side is not None:
        x = norms.own(x) + norms.side(side)
    match placement.residual:
        case "input":
            r = entered
        case "block":
            r = block_input
        case "both":
            r = entered + block_input
    r = norms.residual(r)
    branch = norms.branch(f(times(scales.input, norms.pre(x))))
    if placement.joins == "chord":
        return Streams(main=norms.post(_along_chord(r, branch, norms.layer_scale, scales.branch)))
    added = norms.layer_scale(branch)
    if placement.joins == "geodesic":
        return Streams(main=norms.post(_along_sphere(r, times(scales.branch, added))))
    y = norms.post(times(scales.residual, r) + times(scales.branch, added))
    return Streams(main=y, side=None if side is None else side + times(scales.side, added))


def _along_chord(r: Stream, branch: Stream, step: StreamFunction, scale: Float[Array, ""] | None) -> Stream:
    """u(u(r) + step(u(branch) - u(r))), u(v) = v / |v|. nGPT (2410.01131), eqs. 10 and 11."""
    here, there = unit(r), unit(branch)
    return unit(here + times(scale, step(there - here)))


def _along_sphere(r: Stream, step: Stream) -> Stream:
    """r cos t + |r| v / |v| sin t, t = |v| / |r|, v the part of the step that is orthogonal to r. GeoNorm (2601.22095).

    It is the exponential map of the sphere of radius |r|, so |r| stays. Computed in float32 at least, rounded once.
    """
    wide, ahead = widened(r), widened(step)
    square = jnp.square(wide).sum(-1, keepdims=True)
    square = jnp.where(square == 0, 1, square)
    ahead -= (wide * ahead).sum(-1, keepdims=True) / square * wide
    turned = jnp.square(ahead).sum(-1, keepdims=True) / square
    # sin(t) / t is 1 at t = 0, where the root has no derivative.
    angle = jnp.sqrt(jnp.where(turned == 0, 1, turned))
    sine = jnp.where(turned == 0, 1, jnp.sin(angle) / angle)
    cosine = jnp.where(turned == 0, 1, jnp.cos(angle))
    return (wide * cosine + ahead * sine).astype(r.dtype)


def unchanged(x: Stream) -> Stream:
    """x: what stands in the place of a norm or a learned scale that is absent."""
    return x


def times(scale: Float[Array, ""] | None, x: Array) -> Array:
    """scale * x, multiplied in float32 at least and rounded once to the dtype of x; a scale of None is 1."""
    return x if scale is None else (scale.astype(wide_dtype(x.dtype)) * widened(x)).astype(x.dtype)


def scale_arrays(scales: Scales[float], dtype: str) -> ScaleArrays:
    """The scales of one layer for a stream of this dtype, in float32 at least; None where a scale is 1."""

    def array(scale: float) -> Float[Array, ""] | None:
        return None if scale == 1.0 else jnp.asarray(scale, wide_dtype(dtype))

    return Scales(
        residual=array(scales.residual),
        branch=array(scales.branch),
        input=array(scales.input),
        side=array(scales.side),
    )


def start_arrays(starts: Starts[float], dtype: str) -> StartArrays:
    """Where the learned scales of one layer start, in float32 at least; None where that is 1."""

    def array(start: float) -> Float[Array, ""] | None:
        return None if start == 1.0 else jnp.asarray(start, wide_dtype(dtype))

    return Starts(pre=array(starts.pre), branch=array(starts.branch), layer_scale=array(starts.layer_scale))


def shares(lengths: Float[Array, " layers"], step: Int[Array, ""] | int) -> Float[Array, " layers"]:
    """How large branches are that grow over these lengths, as shares of their full size: min(step / length, 1)."""
    return jnp.minimum(jnp.asarray(step, lengths.dtype) / lengths, 1)


def starting_at(start: Float[Array, ""] | None) -> Callable[..., Array]:
    """Initializer of a learned scale: this number everywhere; None: 1. The number may be traced."""
    if start is None:
        return nn.initializers.ones
    return lambda key, shape, dtype=jnp.float32: jnp.broadcast_to(start, shape).astype(dtype)
