"""What of a ModelConfig decides the numbers that a model computes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.encoder_config import EncoderConfig

ROTATION = ("rope_theta", "rope_scaling", "rope_factor", "rope_original_length", "rope_bounds", "rope_truncate")
LONG_ROTATION = ("rope_attention_factor", "rope_short_factors", "rope_long_factors", "second_rope_theta")


def mathematics(config: ModelConfig) -> dict[str, Any]:
    """What decides the logits, by ModelConfig key; keys without effect in this model are left out."""
    # In this order messages name what an architecture lacks.
    keys = ["d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "activation"]
    if config.activation == "swiglu_clamped":
        keys += ["clamp_limit", "clamp_alpha"]
    keys += ["norm", "norm_eps", "norm_scale", "norm_bias", "norm_width", "attention_bias", "mlp_bias", "head_bias"]
    keys += ["tie_embeddings", "logit_cap", "layer_scale", "score_cap", "qkv_clip", "attention_sinks", "positions"]
    keys += ["learned_embedding_scale"]
    found = {"scheme": (config.placements, config.has_final_norm, config.side_stream, config.scheme_rule.sphere)}
    found["embedding_norm"] = config.has_embedding_norm
    found |= _values(config, keys)
    found["embedding_scale"] = 1.0 if config.embedding_scale is None else config.embedding_scale
    found["logit_scale"] = 1.0 if config.logit_scale is None else config.logit_scale
    found["attention_scale"] = _own_score_scale(config)
    found["attention_output_bias"] = config.has_attention_output_bias
    found["mlp_output_bias"] = config.has_mlp_output_bias
    found["windows"] = config.layer_windows
    if config.norm_scale or config.has_scales_elsewhere:
        found["norm_scale_plus_one"] = config.norm_scale_plus_one
    found |= _outside(config) | _of_positions(config) | _of_head_norms(config) | _of_experts(config)
    return found | _of_encoder(config)


def _outside(config: ModelConfig) -> dict[str, Any]:
    """Of what stands between the blocks and the two ends of the model."""
    keys = ["outer_norm_scale", "outer_norm_bias"] if config.has_outer_norms else []
    return _values(config, [*keys, "whole_outside", "embedding_centring"])


def _own_score_scale(config: ModelConfig) -> float | None:
    """The factor of q k^T; None where it is one over the root of head_dim."""
    is_usual = math.isclose(config.score_scale, 1 / math.sqrt(config.head_dim), rel_tol=1e-12)
    return None if is_usual else config.score_scale


def _of_encoder(config: ModelConfig) -> dict[str, Any]:
    """The keys that an EncoderConfig has besides."""
    if not isinstance(config, EncoderConfig):
        return {}
    shared = {field.name for field in dataclasses.fields(ModelConfig)}
    return _values(config, [field.name for field in dataclasses.fields(config) if field.name not in shared])


def _of_positions(config: ModelConfig) -> dict[str, Any]:
    if config.has_position_table:
        return _values(config, ["max_positions", "position_offset"])
    if config.positions == "alibi":
        return _values(config, ["alibi_max", "alibi_scale", "alibi_bfloat16"])
    found: dict[str, Any] = {"rope_layers": config.layer_rotations}
    if not any(config.layer_rotations):
        return found
    found["rotary_dim"] = None if config.rotary_width == config.head_dim else config.rotary_width
    return found | _values(config, [*ROTATION, *LONG_ROTATION])


def _of_head_norms(config: ModelConfig) -> dict[str, Any]:
    if not config.has_norms_in_branches:
        return {}
    keys = ["attention_norm_scale", "attention_norm_bias", "attention_norm_per_head"]
    return {"attention_norm": config.attention_norm_kind} | _values(config, keys)


def _of_experts(config: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"num_experts": config.num_experts}
    if config.num_experts:
        found |= _values(config, ["experts_per_token", "normalize_expert_weights", "balance_bias", "dense_layers"])
        found |= {"router_bias": config.has_router_bias, "shared_experts": config.shared_width}
        if config.shared_width:
            found |= _values(config, ["shared_expert_gate", "shared_expert_gate_bias"])
        if config.dense_layers:
            found["dense_mlp_dim"] = config.dense_width
    return found


def _values(config: ModelConfig, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in keys}
