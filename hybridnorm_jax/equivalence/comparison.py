"""The three forms of one model, computed side by side."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hybridnorm_jax.config import ModelConfig
from hybridnorm_jax.equivalence.decoder_forms import conversion_of
from hybridnorm_jax.equivalence.invariants import (
    Measured,
    centring_defects,
    forward,
    relative_difference,
    stream_defects,
)
from hybridnorm_jax.norms import zero_mean_defect


def compare_forms(
    config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], *, pad_to: int = 1, **inputs
) -> Measured:
    """Convert Pre-LN parameters to both forms, run all three in float32 at least, and measure every invariant.

    Returns:
      leaves: path -> see centring_defects.
      stream: zero_mean_defect of the Pre-RMSNorm form's stream, (layers + 1,).
      stored, last, norm, padding: see stream_defects, (layers + 1,).
      logits: form -> largest difference from the Pre-LN logits over their largest value.
    """
    wide = dataclasses.replace(config, dtype=jnp.promote_types(config.dtype, jnp.float32).name)
    full = conversion_of(wide, "pre_rmsnorm")
    stored = conversion_of(wide, "pre_crmsnorm", pad_to=pad_to)
    centred = full.convert(params)
    logits, _ = forward(wide, params, tokens, **inputs)
    full_logits, full_stream = forward(full.config, centred, tokens, **inputs)
    stored_logits, stored_stream = forward(stored.config, stored.convert(params), tokens, **inputs)
    return {
        "leaves": centring_defects(centred, full.layout, before=params),
        "stream": jax.vmap(zero_mean_defect)(full_stream),
        **stream_defects(full_stream, stored_stream, config.norm_eps),
        "logits": {
            "pre_rmsnorm": relative_difference(full_logits, logits),
            "pre_crmsnorm": relative_difference(stored_logits, logits),
        },
    }


def compare_norm(config: ModelConfig, params: Any, tokens: Int[Array, "batch seq"], **inputs) -> Measured:
    """Of a model with CRMSNorm at full width: its norm against RMSNorm of the stream with its last element recovered.

    Returns:
      norm: (layers + 1,), see stream_defects.
    """
    wide = dataclasses.replace(config, dtype=jnp.promote_types(config.dtype, jnp.float32).name)
    _, stored = forward(wide, params, tokens, **inputs)
    kept = stored if config.norm_width is None else stored[..., : config.norm_width - 1]
    full = jnp.concatenate([kept, -kept.sum(-1, keepdims=True)], axis=-1)
    return {"norm": stream_defects(full, stored, config.norm_eps)["norm"]}
