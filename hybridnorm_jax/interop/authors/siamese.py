"""SiameseNorm's language model (2602.08064): Qwen-Applications/SiameseNorm, over OLMo."""

from hybridnorm_jax.interop.tensor_layouts import LINEAR_OUT, VECTOR
from hybridnorm_jax.interop.tensor_parts import (
    DOWN,
    FEED_FORWARD_NORM,
    GATE,
    KEY,
    NO_BUFFERS,
    OUT,
    QUERY,
    UP,
    VALUE,
    dense,
    embedding,
    norm,
)
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable

SIAMESE = TensorTable(
    prefix="",
    outer=(
        *embedding("transformer.wte"),
        *norm("transformer.ln_f", "streams/main_norm"),
        *norm("transformer.ln_y_f", "streams/side_norm"),
        *norm("transformer.ln_final_f", "final_norm"),
        *dense("transformer.ff_out", "head"),
    ),
    block=(
        Tensor("c1", ("attention_own_vector/scale",), VECTOR),
        *norm("attn_norm", "attention_own_norm"),
        *norm("attn_y_norm", "attention_side_norm"),
        *norm("ff_norm", "attention_post_norm"),
        *norm("ff_y_norm", "feed_forward_side_norm"),
        *norm("ff_input_norm", FEED_FORWARD_NORM),
        *dense("att_proj", QUERY, KEY, VALUE),
        *norm("q_norm", "attention/q_norm"),
        *norm("k_norm", "attention/k_norm"),
        *norm("v_norm", "attention/v_norm"),
        *dense("attn_out", OUT, kernel=LINEAR_OUT),
        *dense("ff_proj", UP, GATE),
        *dense("ff_out", DOWN),
    ),
    layer="transformer.blocks.{}.",
    head="transformer.ff_out.weight",
    buffers=NO_BUFFERS,
)
