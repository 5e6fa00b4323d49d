"""The three forms of one model, computed side by side."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hybridnorm_jax.equivalence.decoder_forms import conversion_of
from hybridnorm_jax.equivalence.expert_choices import RoutingDifference, compare_routing
from hybridnorm_jax.equivalence.invariants import (
    Measured,
    centring_defects,
    forward,
    relative_difference,
    stream_defects,
)
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norms import zero_mean_defect


def compare_forms(
    config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], *, pad_to: int = 1, **inputs
) -> Measured:
    """Convert Pre-LN parameters to both forms, run all three in float32 at least, and measure every invariant.

    Of a mixture of experts, positions that a different choice of experts has reached are compared by nothing but
    `stream`, `padding` and `ties`; see routing.

    Returns:
      leaves: path -> see centring_defects.
      stream: zero_mean_defect of the Pre-RMSNorm form's stream, (layers + 1,).
      stored, last, norm, padding: see stream_defects, (layers + 1,).
      logits: form -> largest difference from the Pre-LN logits over their largest value.
      routers, ties: of a mixture of experts, see RoutingDifference, the largest of the three pairs of forms, (layers,).
      left_out: of a mixture of experts, the share of positions that were left out, of the pair with the largest,
        (layers + 1,). No limit belongs to it: a single tie at the first token leaves out its sequence.
    """
    wide = dataclasses.replace(config, dtype=jnp.promote_types(config.dtype, jnp.float32).name)
    full = conversion_of(wide, "pre_rmsnorm")
    stored = conversion_of(wide, "pre_crmsnorm", pad_to=pad_to)
    centred = full.convert(params)
    logits, _, routing = forward(wide, params, tokens, **inputs)
    full_logits, full_stream, full_routing = forward(full.config, centred, tokens, **inputs)
    stored_logits, stored_stream, stored_routing = forward(stored.config, stored.convert(params), tokens, **inputs)

    pairs: dict[str, RoutingDifference] = {}
    if routing is not None:
        pairs = {
            "pre_rmsnorm": compare_routing(full_routing, routing, inputs.get("segment_ids")),
            "pre_crmsnorm": compare_routing(stored_routing, routing, inputs.get("segment_ids")),
            "streams": compare_routing(stored_routing, full_routing, inputs.get("segment_ids")),
        }
    left_out = {name: pair.left_out for name, pair in pairs.items()}
    converted = {"pre_rmsnorm": full_logits, "pre_crmsnorm": stored_logits}
    return {
        "leaves": centring_defects(centred, full.layout, before=params),
        "stream": jax.vmap(zero_mean_defect)(full_stream),
        **stream_defects(full_stream, stored_stream, config.norm_eps, left_out.get("streams")),
        "logits": {
            form: relative_difference(found, logits, left_out[form][-1] if pairs else None)
            for form, found in converted.items()
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


def compare_norm(config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], **inputs) -> Measured:
    """Of a model with CRMSNorm at full width: its norm against RMSNorm of the stream with its last element recovered.

    Returns:
      norm: (layers + 1,), see stream_defects.
    """
    wide = dataclasses.replace(config, dtype=jnp.promote_types(config.dtype, jnp.float32).name)
    _, stored, _ = forward(wide, params, tokens, **inputs)
    kept = stored if config.norm_width is None else stored[..., : config.norm_width - 1]
    full = jnp.concatenate([kept, -kept.sum(-1, keepdims=True)], axis=-1)
    return {"norm": stream_defects(full, stored, config.norm_eps)["norm"]}
