"""The stream outside the blocks: its norms, and how it enters the blocks and leaves them.

With model.whole_outside the blocks store a zero-mean stream without its last element, and outside them it is whole.
"""

import jax.numpy as jnp

from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.model.block import Stream
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norm_kinds import NORM_KINDS
from hybridnorm_jax.model.norms import Norm


def outer_norm(config: ModelConfig, *, kind: str | None = None, name: str | None = None) -> Norm:
    """A norm outside the blocks; `kind` in the place of config.outer_norm."""
    kind = config.outer_norm if kind is None else kind
    return Norm(
        kind=kind,
        epsilon=config.norm_eps,
        use_scale=config.outer_norm_scale,
        use_bias=config.outer_norm_bias,
        scale_plus_one=config.norm_scale_plus_one,
        starts=config.norm_starts("outside", kind),
        width=config.norm_width if NORM_KINDS[kind].drops_last else None,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        name=name,
    )


def into_blocks(config: ModelConfig, x: Stream) -> Stream:
    """The embedding as the blocks have it: without its mean with embedding_centring, then stored with whole_outside."""
    x = centred(x) if config.embedding_centring else x
    return without_last(x, config.whole_width, config.d_model) if config.whole_outside else x


def out_of_blocks(config: ModelConfig, x: Stream) -> Stream:
    """What the blocks give as the final norm reads it: whole with whole_outside."""
    return with_last(x, config.whole_width) if config.whole_outside else x


def without_last(x: Stream, width: int, stored: int) -> Stream:
    """The first width - 1 channels of whole vectors, filled up with zeros to `stored`."""
    kept = x[..., : width - 1]
    return jnp.pad(kept, [(0, 0)] * (x.ndim - 1) + [(0, stored - (width - 1))])


def with_last(x: Stream, width: int) -> Stream:
    """Whole zero-mean vectors of `width` channels: the last one is minus the sum of the others."""
    kept = x[..., : width - 1]
    last = -widened(kept).sum(-1, keepdims=True)
    return jnp.concatenate([kept, last.astype(x.dtype)], axis=-1)


def centred(x: Stream) -> Stream:
    """x less its mean over the channels, in float32 at least."""
    wide = widened(x)
    return (wide - wide.mean(-1, keepdims=True)).astype(x.dtype)
