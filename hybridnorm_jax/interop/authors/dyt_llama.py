"""Llama with DyT (2503.10622): jiachenzhu/DyT, other_tasks/LLaMA, over ibm-fms."""

from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS, LINEAR_OUT
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    DOWN,
    FEED_FORWARD_NORM,
    GATE,
    KEY,
    OUT,
    QUERY,
    UP,
    VALUE,
    dense,
    embedding,
    norm,
)
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable


def _dyt(name: str, leaf: str) -> tuple[Tensor, ...]:
    return (*norm(name, leaf), Tensor(f"{name}.alpha", (f"{leaf}/alpha",), AS_IT_IS))


DYT_LLAMA = TensorTable(
    prefix="",
    outer=(
        *embedding("shared.emb"),
        *dense("shared.head", "head"),
        Tensor("shared_scale", ("embedding_scale/scale",), AS_IT_IS),
        *_dyt("dec_norm", "final_norm"),
    ),
    block=(
        *_dyt("ln", ATTENTION_NORM),
        *_dyt("ff_ln", FEED_FORWARD_NORM),
        *dense("attn.in_proj.qkv_fused", QUERY, KEY, VALUE, paired=True),
        *dense("attn.dense", OUT, kernel=LINEAR_OUT),
        *dense("ff_sub_layer.wg1_fused", GATE, UP),
        *dense("ff_sub_layer.w2", DOWN),
    ),
    layer="layers.{}.",
    head="shared.head.weight",
    buffers=r"rot_emb\..*",
)
