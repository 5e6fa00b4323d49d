"""How far converted parameters and streams are from what the conversion guarantees, as plain arrays."""

from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

from hybridnorm_jax.equivalence.layout import ResidualLayout, resolve
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.model.norms import crms_norm, rms_norm

# Name of a measurement -> its values, as invariants.assert_measured takes them.
Measured = dict[str, Any]


def centring_defects(centred: Any, layout: ResidualLayout, before: Any | None = None) -> dict[str, Float[Array, ""]]:
    """For every leaf that writes the stream, how far it is from having zero mean along the axis of the stream.

        max |mean(W, axis)| * sqrt(width) / rms(W before recentring)

    About 1 for a leaf that was not recentred, about one rounding error for one that was.

    Args:
      centred: the tree to measure; `layout` is its layout.
      before: the tree before recentring; a leaf that it has not, or all with None, is measured by its own rms.
    """
    found = resolve(layout, centred)
    reference = found.leaves | ({} if before is None else flatten_dict(before, sep="/"))
    defects = {}
    for path, axis in found.writers.items():
        wide = widened(found.leaves[path])
        rms = jnp.sqrt(jnp.square(jnp.asarray(reference[path]).astype(wide.dtype)).mean())
        mean = jnp.abs(wide.mean(axis)).max()
        # NaN is no zero: it stays NaN.
        defects[path] = jnp.where(mean == 0, 0, mean * found.width**0.5 / jnp.where(rms > 0, rms, 1))
    return defects


def stream_defects(
    full: Float[Array, "layers batch seq width"],
    stored: Float[Array, "layers batch seq stored"],
    eps: float,
    left_out: Bool[Array, "layers batch seq"] | None = None,
) -> Measured:
    """Per layer, how far a stored stream and its norm are from the full, zero-mean one; all relative to its rms.

    Args:
      left_out: where the streams are not compared, see expert_choices.py; the padding is measured everywhere.

    Returns:
      stored: of the first width - 1 elements.
      padding: of what lies behind them.
      last: of the recovered element, -sum(stored).
      norm: CRMSNorm of the stored stream against RMSNorm of the full one, absolute.
    """
    width = full.shape[-1]
    rms = jnp.sqrt(jnp.square(full).mean(-1, keepdims=True))
    rms = jnp.where(rms > 0, rms, 1)
    kept, padding = stored[..., : width - 1], stored[..., width - 1 :]
    differences = {
        "stored": (kept - full[..., :-1]) / rms,
        "last": (-kept.sum(-1, keepdims=True) - full[..., -1:]) / rms,
        "norm": crms_norm(stored, eps=eps, width=width)[..., : width - 1] - rms_norm(full, eps=eps)[..., :-1],
    }
    if left_out is not None:
        differences = {name: jnp.where(left_out[..., None], 0, value) for name, value in differences.items()}
    if padding.shape[-1]:
        differences["padding"] = padding / rms
    return {name: jnp.abs(value).max((1, 2, 3)) for name, value in differences.items()}


def relative_difference(
    found: Float[Array, "batch seq width"],
    expected: Float[Array, "batch seq width"],
    left_out: Bool[Array, "batch seq"] | None = None,
) -> Float[Array, ""]:
    """max |found - expected| / max |expected|; absolute where all that is expected is 0.

    Args:
      left_out: where the two are not compared, see expert_choices.py.
    """
    largest, difference = jnp.abs(expected).max(), jnp.abs(found - expected)
    if left_out is not None:
        difference = jnp.where(left_out[..., None], 0, difference)
    return difference.max() / jnp.where(largest > 0, largest, 1)
