"""The three forms of one model, computed side by side."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.equivalence.expert_choices import compare_routing
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.equivalence.forward_pass import ForwardPass, forward
from hybridnorm_jax.equivalence.measurements import (
    Measured,
    centring_defects,
    relative_difference,
    stream_defects,
)
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norm_functions import zero_mean_defect


def compare_forms(
    config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], *, pad_to: int = 1, **inputs: Any
) -> Measured:
    """Convert Pre-LN parameters to both forms, run all three in float32 at least, and measure every invariant.

    In a mixture of experts a different choice of experts reaches later positions. Of these nothing but `stream`,
    `padding` and `ties` is measured; see expert_choices.py. Of `routers`, `ties` and `left_out` the result has the
    largest of the three pairs of forms.

    Args:
      config: of the Pre-LN model.
      params: of the Pre-LN model.
      tokens: what the three models read.
      pad_to: see to_pre_crmsnorm.
      inputs: further arguments of the Decoder, such as segment_ids.

    Returns:
      All but `trained`; `padding`, and what is measured of experts, where the model has them.
    """
    wide = _in_wide_dtype(config)
    to_full = conversion_of(wide, "pre_rmsnorm")
    to_stored = conversion_of(wide, "pre_crmsnorm", pad_to=pad_to)
    centred = to_full.convert(params)
    original = forward(wide, params, tokens, **inputs)
    full = forward(to_full.config, centred, tokens, **inputs)
    stored = forward(to_stored.config, to_stored.convert(params), tokens, **inputs)

    choices = _compare_choices(original, full, stored, inputs.get("segment_ids"))
    streams = stream_defects(full.stream, stored.stream, config.norm_eps, choices.streams_left_out)
    return Measured(
        leaves=centring_defects(centred, to_full.layout, before=params),
        stream=jax.vmap(zero_mean_defect)(full.stream),
        stored=streams.stored,
        last=streams.last,
        norm=streams.norm,
        padding=streams.padding,
        logits={
            "pre_rmsnorm": relative_difference(full.output, original.output, choices.full_left_out),
            "pre_crmsnorm": relative_difference(stored.output, original.output, choices.stored_left_out),
        },
        routers=choices.routers,
        ties=choices.ties,
        left_out=choices.left_out,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Choices:
    """How the three forms choose experts; all None for a dense model.

    Attributes:
      full_left_out: where the logits of the Pre-RMSNorm form and the original are not compared.
      stored_left_out: where those of the Pre-CRMSNorm form and the original are not.
      streams_left_out: where the streams of the two forms are not.
      routers, ties, left_out: see Measured; the largest of the three pairs.
    """

    full_left_out: Bool[Array, "batch seq"] | None = None
    stored_left_out: Bool[Array, "batch seq"] | None = None
    streams_left_out: Bool[Array, "layers_and_1 batch seq"] | None = None
    routers: Float[Array, " layers"] | None = None
    ties: Float[Array, " layers"] | None = None
    left_out: Float[Array, " layers_and_1"] | None = None


def _compare_choices(
    original: ForwardPass, full: ForwardPass, stored: ForwardPass, segment_ids: Int[Array, "batch seq"] | None
) -> _Choices:
    if original.routing is None:
        return _Choices()
    of_full = compare_routing(full.routing, original.routing, segment_ids)
    of_stored = compare_routing(stored.routing, original.routing, segment_ids)
    of_streams = compare_routing(stored.routing, full.routing, segment_ids)
    pairs = (of_full, of_stored, of_streams)
    return _Choices(
        full_left_out=of_full.left_out[-1],
        stored_left_out=of_stored.left_out[-1],
        streams_left_out=of_streams.left_out,
        routers=jnp.stack([pair.routers for pair in pairs]).max(0),
        ties=jnp.stack([pair.ties for pair in pairs]).max(0),
        left_out=jnp.stack([pair.left_out.mean((1, 2)) for pair in pairs]).max(0),
    )


def compare_norm(config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], **inputs: Any) -> Measured:
    """`norm` for a model with CRMSNorm: its norm against RMSNorm of the stream with its last element recovered."""
    stored = forward(_in_wide_dtype(config), params, tokens, **inputs).stream
    kept = stored if config.norm_width is None else stored[..., : config.norm_width - 1]
    full = jnp.concatenate([kept, -kept.sum(-1, keepdims=True)], axis=-1)
    return Measured(norm=stream_defects(full, stored, config.norm_eps).norm)


def _in_wide_dtype(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, dtype=wide_dtype(config.dtype).name)
