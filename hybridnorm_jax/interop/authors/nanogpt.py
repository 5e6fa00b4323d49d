"""nanoGPT with DyT or Derf in the place of its norms (2512.10938): zlab-princeton/Derf, its language model."""

from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS, LINEAR_OUT
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    DOWN,
    FEED_FORWARD_NORM,
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


def _norm(name: str, leaf: str) -> tuple[Tensor, ...]:
    own = (Tensor(f"{name}.{each}", (f"{leaf}/{each}",), AS_IT_IS) for each in ("alpha", "shift"))
    return (*norm(name, leaf), *own)


NANOGPT = TensorTable(
    prefix="",
    outer=(
        *embedding("transformer.wte"),
        *embedding("transformer.wpe", "position_embedding"),
        Tensor("shared_scale", ("embedding_scale/scale",), AS_IT_IS),
        *_norm("transformer.ln_f", "final_norm"),
    ),
    block=(
        *_norm("ln_1", ATTENTION_NORM),
        *_norm("ln_2", FEED_FORWARD_NORM),
        *dense("attn.c_attn", QUERY, KEY, VALUE),
        *dense("attn.c_proj", OUT, kernel=LINEAR_OUT),
        *dense("mlp.c_fc", UP),
        *dense("mlp.c_proj", DOWN),
    ),
    layer="transformer.h.{}.",
    head="lm_head.weight",
    buffers=r"transformer\.h\.\d+\.attn\.bias",
)
