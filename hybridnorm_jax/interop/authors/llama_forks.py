"""Forks of Llama whose blocks normalize in several places: Mix-LN, LayerNorm-Scaling, ProRes.

A name of a norm says where it stands in the code, and that depends on the block:

    name                         in Pre-Norm           in Post-Norm           in Sandwich
    input_layernorm              before attention      -                      before attention
    post_attention_layernorm     before the MLP        behind the first sum   behind attention
    pre_feedforward_layernorm    -                     -                      before the MLP
    post_feedforward_layernorm   -                     behind the second sum  behind the MLP

Blocks in Post-Norm and in Pre-Norm stand in one model of Mix-LN.
"""

from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    FEED_FORWARD_NORM,
    GATED_MLP,
    attention,
    llama_table,
    norm,
    only,
)
from hybridnorm_jax.model.config import ModelConfig


def _is_sandwich(config: ModelConfig) -> bool:
    return any(block.attention.branch for block in config.placements)


def _is_not_sandwich(config: ModelConfig) -> bool:
    return not _is_sandwich(config)


LLAMA_FORKS = llama_table(
    attention(),
    GATED_MLP,
    norm("input_layernorm", ATTENTION_NORM),
    norm("post_attention_layernorm", "attention_branch_norm"),
    norm("post_attention_layernorm", "attention_post_norm"),
    only(_is_not_sandwich, *norm("post_attention_layernorm", FEED_FORWARD_NORM)),
    only(_is_sandwich, *norm("pre_feedforward_layernorm", FEED_FORWARD_NORM)),
    norm("post_feedforward_layernorm", "feed_forward_branch_norm"),
    norm("post_feedforward_layernorm", "feed_forward_post_norm"),
)
