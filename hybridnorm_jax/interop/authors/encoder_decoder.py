"""Decoders of fairseq and torchscale, which name their tensors alike: NormFormer, ResiDual, Sub-LN, DeepNorm."""

from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS, LINEAR_OUT
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    DOWN,
    FEED_FORWARD_NORM,
    NO_BUFFERS,
    OUT,
    UP,
    dense,
    embedding,
    norm,
    separate_qkv,
)
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable

# A norm of a sublayer has one name, whether it stands before the branch or behind the sum.
_SUBLAYER_NORMS = (
    *norm("self_attn_layer_norm", ATTENTION_NORM),
    *norm("self_attn_layer_norm", "attention_post_norm"),
    *norm("final_layer_norm", FEED_FORWARD_NORM),
    *norm("final_layer_norm", "feed_forward_post_norm"),
)
_OUTER = (
    *embedding("embed_tokens"),
    *embedding("embed_positions", "position_embedding"),
    *dense("output_projection", "head"),
)
_ATTENTION = (*separate_qkv(), *dense("self_attn.out_proj", OUT, kernel=LINEAR_OUT))

TORCHSCALE = TensorTable(
    prefix="",
    outer=(*_OUTER, *norm("layer_norm", "final_norm")),
    block=(
        *_SUBLAYER_NORMS,
        *_ATTENTION,
        *norm("self_attn.inner_attn_ln", "attention/context_norm"),
        *dense("ffn.fc1", UP),
        *dense("ffn.fc2", DOWN),
        *norm("ffn.ffn_layernorm", "feed_forward/hidden_norm"),
    ),
    layer="layers.{}.",
    head="output_projection.weight",
    buffers=NO_BUFFERS,
)
FAIRSEQ = TensorTable(
    prefix="",
    # ResiDual's layer_norm is that of its second stream.
    outer=(*_OUTER, *norm("layer_norm", "final_norm"), *norm("layer_norm", "streams/side_norm")),
    block=(
        *_SUBLAYER_NORMS,
        *_ATTENTION,
        Tensor("c_attn", ("attention/head_scales/scale",), AS_IT_IS),
        *norm("attn_ln", "attention_branch_norm"),
        *dense("fc1", UP),
        *dense("fc2", DOWN),
        *norm("ffn_layernorm", "feed_forward/hidden_norm"),
        Tensor("w_resid", ("feed_forward_residual_vector/scale",), AS_IT_IS),
    ),
    layer="layers.{}.",
    head="output_projection.weight",
    buffers=NO_BUFFERS,
)
