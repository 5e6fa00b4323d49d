"""SimpleGPT (2602.01212): Ocram7/SimpleGPT. Every linear layer is followed by a norm."""

from hybridnorm_jax.interop.tensor_layouts import LINEAR_OUT
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
    norm,
)
from hybridnorm_jax.interop.tensor_places import TensorTable

SIMPLEGPT = TensorTable(
    prefix="",
    outer=(*embedding("tok_embeddings"), *norm("norm", "final_norm"), *dense("output", "head")),
    block=(
        *dense("attention.snq.lin", QUERY, paired=True),
        *norm("attention.snq.norm", "attention/q_norm", paired=True),
        *dense("attention.snk.lin", KEY, paired=True),
        *norm("attention.snk.norm", "attention/k_norm", paired=True),
        *dense("attention.snv.lin", VALUE),
        *norm("attention.snv.norm", "attention/v_norm"),
        *dense("attention.sno.lin", OUT, kernel=LINEAR_OUT),
        *norm("attention.sno.norm", "attention_branch_norm"),
        *dense("feed_forward.sn1.lin", GATE),
        *norm("feed_forward.sn1.norm", "feed_forward/gate_norm"),
        *dense("feed_forward.sn3.lin", UP),
        *norm("feed_forward.sn3.norm", "feed_forward/up_norm"),
        *dense("feed_forward.sn2.lin", DOWN),
        *norm("feed_forward.sn2.norm", "feed_forward_branch_norm"),
    ),
    layer="layers.{}.",
    head="output.weight",
    buffers=NO_BUFFERS,
)
