"""The four transforms, as pure functions on parameter trees; each is jit-able and differentiable.

    Pre-LN --fold_affine, recenter--> Pre-RMSNorm --compress--> Pre-CRMSNorm --decompress--> Pre-RMSNorm

All take a ResidualLayout, keep every leaf's dtype and compute in at least float32. Source: 2305.14858, sections 3.1 and
3.2. Folding is this project's: the paper leaves scale and bias out.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hybridnorm_jax.equivalence.layout import LayoutError, Reader, ResidualLayout, Resolved, resolve
from hybridnorm_jax.kernels.precision import widened


def fold_affine(params: Any, layout: ResidualLayout) -> dict:
    """Move every norm's scale and bias into all that read it; the norms' leaves are gone from the result.

        A <- diag(scale) A,  c <- c + input_scale * bias A     for each reader n A + c of the norm

    The function stays the same, with any norm. A tied head must have been untied before.

    Raises:
      LayoutError: the layout does not fit; a norm has a bias, but one of its readers has none to take it.
    """
    found = resolve(layout, params)
    changed: dict[str, Array] = {}
    for path, reader in found.readers.items():
        kernel = widened(found.leaves[path])
        if reader.norm is not None and reader.norm in found.biases:
            bias = _own_bias(path, reader, norm_bias=found.biases[reader.norm])
            changed[bias] = _bias_with_norms(found, path, reader, bias=bias, norm_bias=found.biases[reader.norm])
        if reader.norm is not None and reader.norm in found.scales:
            kernel = _beside(found, found.scales[reader.norm], path, reader) * kernel
        changed[path] = kernel.astype(found.leaves[path].dtype)
    return found.tree(changed, removed=frozenset(found.norm_leaves))


def recenter(params: Any, layout: ResidualLayout) -> dict:
    """Take the mean out of everything that writes the stream, along the axis of the stream: W <- W - mean(W).

    LayerNorm then equals RMSNorm wherever the stream is read, so Pre-LN becomes Pre-RMSNorm.

    Raises:
      LayoutError: the layout does not fit.
    """
    found = resolve(layout, params)
    return found.tree({path: _centred(found.leaves[path], axis) for path, axis in found.writers.items()})


def compress(params: Any, layout: ResidualLayout, *, pad_to: int = 1) -> dict:
    """Store the zero-mean stream without its last element: Pre-RMSNorm becomes Pre-CRMSNorm.

        writers  W <- W without its last column         readers  A <- A[:-1] - A[-1:]

    Args:
      pad_to: the stored width is filled up with zeros to a multiple of this.

    Raises:
      LayoutError: the layout does not fit, or a norm still has its scale or bias (fold_affine comes first).
    """
    found = resolve(layout, params)
    if found.norm_leaves:
        path = found.norm_leaves[0]
        raise LayoutError(f"{path}: a norm's scale or bias is still there; fold_affine comes before compress")
    stored = found.width - 1
    padded = stored_width(found.width, pad_to)
    changed = {path: _resize(found.leaves[path], axis, stored, padded) for path, axis in found.writers.items()}
    for path, reader in found.readers.items():
        kernel = found.leaves[path]
        wide = widened(kernel)
        # Row by row: the last one, which the stream no longer has, is minus the sum of the others.
        wide = wide - jax.lax.slice_in_dim(wide, stored, None, axis=reader.axis)
        changed[path] = _resize(wide.astype(kernel.dtype), reader.axis, stored, padded)
    return found.tree(changed)


def decompress(params: Any, layout: ResidualLayout, *, width: int) -> dict:
    """The way back: Pre-CRMSNorm becomes Pre-RMSNorm of `width` channels.

        writers  W <- [W, -sum(W)]         readers  A <- [A; 0]

    compress(decompress(x)) is x, bit for bit; decompress(compress(x)) computes what x computes with other readers,
    since A and A + const read the same of a zero-mean stream.

    Args:
      width: true width of the stream; what is stored beyond width - 1 is padding.

    Raises:
      LayoutError: the layout does not fit, or the tree stores less than width - 1.
    """
    found = resolve(layout, params)
    if not 2 <= width <= found.width + 1:
        raise LayoutError(f"width={width}: the tree stores {found.width} channels, so it can be at most one more")
    changed = {}
    for path, axis in found.writers.items():
        kept = _resize(found.leaves[path], axis, width - 1, width - 1)
        last = -widened(kept).sum(axis, keepdims=True).astype(kept.dtype)
        changed[path] = jnp.concatenate([kept, last], axis)
    for path, reader in found.readers.items():
        changed[path] = _resize(found.leaves[path], reader.axis, width - 1, width)
    return found.tree(changed)


def stored_width(width: int, pad_to: int = 1) -> int:
    """Channels that compress stores of a stream of `width`: width - 1, filled up to a multiple of pad_to."""
    if pad_to < 1:
        raise LayoutError(f"pad_to={pad_to}: must be at least 1")
    return math.ceil((width - 1) / pad_to) * pad_to


def _centred(leaf: Any, axis: int) -> Array:
    # Twice: with a mean of a million deviations the first mean's own rounding would stay.
    wide = widened(leaf)
    wide = wide - wide.mean(axis, keepdims=True)
    return (wide - wide.mean(axis, keepdims=True)).astype(jnp.asarray(leaf).dtype)


def _own_bias(path: str, reader: Reader, *, norm_bias: str) -> str:
    """The path of a reader's bias, which must be there to take its norm's."""
    if reader.bias is None:
        need = f"give it a bias of zeros that takes {norm_bias}"
        raise LayoutError(f"{path}: reads a norm that has a bias, but has none itself: {need}")
    return reader.bias


def _bias_with_norms(found: Resolved, path: str, reader: Reader, *, bias: str, norm_bias: str) -> Array:
    """The bias of a reader, with what the reader makes of its norm's bias added to it."""
    own = found.leaves[bias]
    added = _scaled(path, _read(found, norm_bias, path, reader), reader.input_scale)
    if added.shape != own.shape:
        raise LayoutError(f"{bias}: has shape {own.shape}, but {path} gives {added.shape}")
    return (widened(own) + added).astype(own.dtype)


def _beside(found: Resolved, norm_leaf: str, path: str, reader: Reader) -> Array:
    """A norm's vector, shaped to be multiplied with its reader: stacked layers first, the stream on the read axis."""
    vector, kernel = widened(found.leaves[norm_leaf]), found.leaves[path]
    if norm_leaf in found.plus_one:
        vector = 1 + vector
    _check_leading(found, norm_leaf, path, reader)
    *stacked, width = vector.shape
    shape = [1] * kernel.ndim
    shape[: len(stacked)] = stacked
    shape[reader.axis] = width
    return vector.reshape(shape)


def _check_leading(found: Resolved, norm_leaf: str, path: str, reader: Reader) -> None:
    """A norm's stacked layers must stand in front of its reader's axes."""
    vector, kernel = found.leaves[norm_leaf].shape, found.leaves[path].shape
    leading = vector[:-1]
    if kernel[: len(leading)] != leading or reader.axis < len(leading):
        raise LayoutError(f"{path}: has shape {kernel}, but its norm's {norm_leaf} has {vector}")


def _read(found: Resolved, norm_leaf: str, path: str, reader: Reader) -> Array:
    """What a reader without its own bias makes of a norm's vector."""
    vector, kernel = widened(found.leaves[norm_leaf]), widened(found.leaves[path])
    _check_leading(found, norm_leaf, path, reader)
    # The axes of both by their numbers in the kernel: the vector has the stacked layers' and the one that is read.
    kernel_axes = list(range(kernel.ndim))
    vector_axes = [*range(vector.ndim - 1), reader.axis]
    kept = [axis for axis in kernel_axes if axis != reader.axis]
    # A product, not a multiplication and a sum: fused into the layer's own product, the sum took half a step on a CPU.
    return jnp.einsum(vector, vector_axes, kernel, kernel_axes, kept, precision=jax.lax.Precision.HIGHEST)


def _scaled(path: str, result: Array, scale: float | tuple[float, ...]) -> Array:
    """A reader's result times its input scale: one number, or one for each of the layers in front."""
    if not isinstance(scale, tuple):
        return scale * result
    layers, *others = result.shape
    if len(scale) != layers:
        raise LayoutError(f"{path}: {len(scale)} input scales for {layers} stacked layers")
    per_layer = jnp.asarray(scale, result.dtype).reshape([layers] + [1] * len(others))
    return per_layer * result


def _resize(leaf: Any, axis: int, kept: int, width: int) -> Array:
    """The first `kept` along the axis, filled up with zeros to `width`."""
    leaf = jnp.asarray(leaf)
    shape = list(leaf.shape)
    shape[axis] = width - kept
    start = jax.lax.slice_in_dim(leaf, 0, kept, axis=axis)
    if width == kept:
        return start
    return jnp.concatenate([start, jnp.zeros(shape, leaf.dtype)], axis)
