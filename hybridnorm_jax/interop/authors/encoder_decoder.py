"""Decoders of fairseq and torchscale, which name their tensors alike: NormFormer, ResiDual, B2T, Sub-LN, DeepNorm."""

from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS, LINEAR, LINEAR_OUT
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    FEED_FORWARD_NORM,
    OUT,
    dense,
    embedding,
    norm,
    plain_mlp,
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
# A tensor of fairseq's decoders with the number of their format.
_BUFFERS = "version"
_ATTENTION = (*separate_qkv(), *dense("self_attn.out_proj", OUT, kernel=LINEAR_OUT))
_FEED_FORWARD = plain_mlp("fc1", "fc2")

TORCHSCALE = TensorTable(
    prefix="",
    outer=(*_OUTER, *norm("layer_norm", "final_norm")),
    block=(
        *_SUBLAYER_NORMS,
        *_ATTENTION,
        *norm("self_attn.inner_attn_ln", "attention/context_norm"),
        *plain_mlp("ffn.fc1", "ffn.fc2"),
        *norm("ffn.ffn_layernorm", "feed_forward/hidden_norm"),
    ),
    layer="layers.{}.",
    head="output_projection.weight",
    buffers=_BUFFERS,
)
FAIRSEQ = TensorTable(
    prefix="",
    # ResiDual's layer_norm is that of its second stream.
    outer=(*_OUTER, *norm("layer_norm", "final_norm"), *norm("layer_norm", "streams/side_norm")),
    block=(
        *_SUBLAYER_NORMS,
        *_ATTENTION,
        *_FEED_FORWARD,
        Tensor("c_attn", ("attention/head_scales/scale",), AS_IT_IS),
        *norm("attn_ln", "attention_branch_norm"),
        *norm("ffn_layernorm", "feed_forward/hidden_norm"),
        Tensor("w_resid", ("feed_forward_residual_vector/scale",), AS_IT_IS),
    ),
    layer="layers.{}.",
    head="output_projection.weight",
    buffers=_BUFFERS,
)
# The matrix of its head is a parameter of the decoder, and no layer's.
B2T = TensorTable(
    prefix="",
    outer=(
        *embedding("embed_tokens"),
        *embedding("embed_positions_original", "position_embedding"),
        Tensor("embed_out", ("head/kernel",), LINEAR),
    ),
    block=(*_SUBLAYER_NORMS, *_ATTENTION, *_FEED_FORWARD),
    layer="layers.{}.",
    head="embed_out",
    buffers=_BUFFERS,
)
