"""The three forms of one model, computed side by side."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hybridnorm_jax.equivalence.decoder_forms import conversion_of
from hybridnorm_jax.equivalence.expert_choices import RoutingDifference, compare_routing
from hybridnorm_jax.equivalence.forward_pass import forward
from hybridnorm_jax.equivalence.measurements import (
    Measured,
    centring_defects,
    relative_difference,
    stream_defects,
)
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norms import zero_mean_defect


def compare_forms(
    config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], *, pad_to: int = 1, **inputs: Any
) -> Measured:
    """Convert Pre-LN parameters to both forms, run all three in float32 at least, and measure every invariant.

    In a mixture of experts a different choice of experts reaches later positions. Of these nothing but `stream`,
    `padding` and `ties` is measured; see expert_choices.py.

    Args:
      config: of the Pre-LN model.
      params: of the Pre-LN model.
      tokens: what the three models read.
      pad_to: see to_pre_crmsnorm.
      inputs: further arguments of the Decoder, such as segment_ids.

    Returns:
      leaves: path -> see centring_defects.
      stream: zero_mean_defect of the Pre-RMSNorm form's stream, (layers + 1,).
      stored, last, norm, padding: see stream_defects, (layers + 1,).
      logits: form -> largest difference from the Pre-LN logits over their largest value.
      routers, ties: of a mixture of experts, see RoutingDifference, the largest of the three pairs of forms, (layers,).
      left_out: of a mixture of experts, the share of positions that were left out, of the pair with the largest,
        (layers + 1,). No limit belongs to it: a single tie at the first token leaves out its sequence.
    """
    wide = _in_wide_dtype(config)
    to_full = conversion_of(wide, "pre_rmsnorm")
    to_stored = conversion_of(wide, "pre_crmsnorm", pad_to=pad_to)
    centred = to_full.convert(params)
    original = forward(wide, params, tokens, **inputs)
    full = forward(to_full.config, centred, tokens, **inputs)
    stored = forward(to_stored.config, to_stored.convert(params), tokens, **inputs)

    pairs: dict[str, RoutingDifference] = {}
    if original.routing is not None:
        segment_ids = inputs.get("segment_ids")
        pairs = {
            "pre_rmsnorm": compare_routing(full.routing, original.routing, segment_ids),
            "pre_crmsnorm": compare_routing(stored.routing, original.routing, segment_ids),
            "streams": compare_routing(stored.routing, full.routing, segment_ids),
        }
    left_out = {name: pair.left_out for name, pair in pairs.items()}
    return {
        "leaves": centring_defects(centred, to_full.layout, before=params),
        "stream": jax.vmap(zero_mean_defect)(full.stream),
        **stream_defects(full.stream, stored.stream, config.norm_eps, left_out.get("streams")),
        "logits": {
            form: relative_difference(converted.logits, original.logits, left_out[form][-1] if pairs else None)
            for form, converted in (("pre_rmsnorm", full), ("pre_crmsnorm", stored))
        },
        **_of_all(pairs),
    }


def _of_all(pairs: Mapping[str, RoutingDifference]) -> Measured:
    """The largest of all pairs; nothing for a dense model."""
    if not pairs:
        return {}

    def largest(value: Callable[[RoutingDifference], Array]) -> Array:
        return jnp.stack([value(pair) for pair in pairs.values()]).max(0)

    return {
        "routers": largest(lambda pair: pair.routers),
        "ties": largest(lambda pair: pair.ties),
        "left_out": largest(lambda pair: pair.left_out.mean((1, 2))),
    }


def compare_norm(config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], **inputs: Any) -> Measured:
    """For a model with CRMSNorm: its norm against RMSNorm of the stream with its last element recovered.

    Returns:
      norm: (layers + 1,), see stream_defects.
    """
    stored = forward(_in_wide_dtype(config), params, tokens, **inputs).stream
    kept = stored if config.norm_width is None else stored[..., : config.norm_width - 1]
    full = jnp.concatenate([kept, -kept.sum(-1, keepdims=True)], axis=-1)
    return {"norm": stream_defects(full, stored, config.norm_eps)["norm"]}


def _in_wide_dtype(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, dtype=wide_dtype(config.dtype).name)
