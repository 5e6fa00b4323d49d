"""How far converted parameters and streams are from what the conversion guarantees, as plain arrays."""

from typing import Any

import flax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

from hybridnorm_jax.equivalence.layout import ResidualLayout, resolve
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.model.norm_functions import crms_norm, rms_norm


@flax.struct.dataclass
class Measured:
    """What was measured of one model and batch; None: that was not. invariants.tolerances has the limits.

    "The stream" is a value after the embedding and after each block, (layers + 1,). "The routers" is a value for each
    layer.

    Attributes:
      leaves: path -> see centring_defects.
      trained: norms.zero_mean_defect or padding_defect of the stream of the training forward pass.
      stream: zero_mean_defect of the Pre-RMSNorm form's stream.
      stored: of the stream: the first width - 1 elements of the Pre-CRMSNorm form's against the full ones.
      last: of the stream: the recovered last element, -sum(stored), against the full one.
      norm: of the stream: CRMSNorm of the stored one against RMSNorm of the full one, absolute.
      padding: of the stream: what lies behind the first width - 1 elements; None where nothing does.
      logits: form -> largest difference from the Pre-LN logits over their largest value.
      routers, ties: of the routers: see expert_choices.RoutingDifference; None for a dense model, as is left_out.
      left_out: of the stream: the share of positions at which the forms are not compared (expert_choices.py). No limit
        belongs to it: a single tie at the first token leaves out its sequence.
    """

    leaves: dict[str, Float[Array, ""]] | None = None
    trained: Float[Array, " layers_and_1"] | None = None
    stream: Float[Array, " layers_and_1"] | None = None
    stored: Float[Array, " layers_and_1"] | None = None
    last: Float[Array, " layers_and_1"] | None = None
    norm: Float[Array, " layers_and_1"] | None = None
    padding: Float[Array, " layers_and_1"] | None = None
    logits: dict[str, Float[Array, ""]] | None = None
    routers: Float[Array, " layers"] | None = None
    ties: Float[Array, " layers"] | None = None
    left_out: Float[Array, " layers_and_1"] | None = None


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
    """`stored`, `last`, `norm` and `padding` of a stored stream and the full, zero-mean one; relative to the full rms.

    Args:
      left_out: where the streams are not compared, see expert_choices.py; the padding is measured everywhere.
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
    return Measured(**{name: jnp.abs(value).max((1, 2, 3)) for name, value in differences.items()})


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
