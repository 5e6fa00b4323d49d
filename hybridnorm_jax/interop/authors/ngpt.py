"""nGPT (2410.01131): NVIDIA/ngpt, over nanoGPT."""

from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS, LINEAR_OUT, VECTOR
from hybridnorm_jax.interop.tensor_parts import (
    DOWN,
    GATE,
    KEY,
    NO_BUFFERS,
    OUT,
    QUERY,
    UP,
    VALUE,
    dense,
    embedding,
)
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable

NGPT = TensorTable(
    prefix="",
    outer=(
        *embedding("transformer.wte"),
        *dense("lm_head", "head"),
        Tensor("sz", ("head/scales/scale",), AS_IT_IS),
    ),
    block=(
        *dense("query", QUERY),
        *dense("key", KEY),
        *dense("value", VALUE),
        *dense("att_c_proj", OUT, kernel=LINEAR_OUT),
        Tensor("sqk", ("attention/qk_scale/scale",), VECTOR),
        Tensor("attn_alpha", ("attention_layer_scale/scale",), VECTOR),
        # The second half passes the gate.
        *dense("c_fc", UP, GATE),
        Tensor("suv", ("feed_forward/up_scale/scale", "feed_forward/gate_scale/scale"), VECTOR),
        *dense("mlp_c_proj", DOWN),
        Tensor("mlp_alpha", ("feed_forward_layer_scale/scale",), VECTOR),
    ),
    layer="transformer.h.{}.",
    head="lm_head.weight",
    buffers=NO_BUFFERS,
)
