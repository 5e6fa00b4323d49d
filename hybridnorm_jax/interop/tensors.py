"""Which tensor of a Hugging Face checkpoint holds which leaves of our parameter tree.

One table per architecture serves both directions; tensor_places.py says how. A new architecture is one more entry of
TABLES here and one of ARCHITECTURES in architectures.py.
"""

import dataclasses
from collections.abc import Mapping

from hybridnorm_jax.interop.tensor_places import (
    AS_IT_IS,
    CONV1D,
    CONV1D_OUT,
    LINEAR,
    LINEAR_OUT,
    LINEAR_PER_HEAD,
    TABLE,
    VECTOR,
    VECTOR_PER_HEAD,
    Layout,
    Tensor,
    TensorTable,
)
from hybridnorm_jax.model.placement import HEAD_NORMS


def _dense(name: str, *leaves: str, kernel: Layout = LINEAR, bias: Layout = VECTOR) -> tuple[Tensor, ...]:
    """A linear layer and its bias; which of the two a model has, its config says."""
    return (
        Tensor(f"{name}.weight", tuple(f"{leaf}/kernel" for leaf in leaves), kernel),
        Tensor(f"{name}.bias", tuple(f"{leaf}/bias" for leaf in leaves), bias),
    )


def _norm(name: str, leaf: str) -> tuple[Tensor, ...]:
    return Tensor(f"{name}.weight", (f"{leaf}/scale",), VECTOR), Tensor(f"{name}.bias", (f"{leaf}/bias",), VECTOR)


def _embedding(name: str, leaf: str = "token_embedding") -> tuple[Tensor, ...]:
    return (Tensor(f"{name}.weight", (f"{leaf}/embedding",), TABLE),)


_QUERY, _KEY, _VALUE = "attention/query", "attention/key", "attention/value"
_SEPARATE_QKV = (
    *_dense("self_attn.q_proj", _QUERY),
    *_dense("self_attn.k_proj", _KEY),
    *_dense("self_attn.v_proj", _VALUE),
)
_Q_K_NORMS = (*_norm("self_attn.q_norm", "attention/q_norm"), *_norm("self_attn.k_norm", "attention/k_norm"))
_LLAMA_ATTENTION = (*_SEPARATE_QKV, *_dense("self_attn.o_proj", "attention/out", kernel=LINEAR_OUT))
_LLAMA_BRANCHES = (
    *_LLAMA_ATTENTION,
    *_dense("mlp.gate_proj", "feed_forward/gate"),
    *_dense("mlp.up_proj", "feed_forward/up"),
    *_dense("mlp.down_proj", "feed_forward/down"),
)
_ATTENTION_NORM, _FEED_FORWARD_NORM = "attention_pre_norm", "feed_forward_pre_norm"
_LLAMA_PRE_NORMS = (
    *_norm("input_layernorm", _ATTENTION_NORM),
    *_norm("post_attention_layernorm", _FEED_FORWARD_NORM),
)
_LLAMA = TensorTable(
    prefix="model.",
    outer=(*_embedding("model.embed_tokens"), *_dense("lm_head", "head"), *_norm("model.norm", "final_norm")),
    block=_LLAMA_PRE_NORMS + _LLAMA_BRANCHES,
    layer="model.layers.{}.",
    head="lm_head.weight",
    buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
_OLMO2_BRANCH_NORMS = (
    *_norm("post_attention_layernorm", "attention_branch_norm"),
    *_norm("post_feedforward_layernorm", "feed_forward_branch_norm"),
)
_OLMOE_EXPERTS = (
    *_dense("mlp.gate", "feed_forward/router"),
    *_dense("mlp.experts.{}.gate_proj", "feed_forward/expert_gate"),
    *_dense("mlp.experts.{}.up_proj", "feed_forward/expert_up"),
    *_dense("mlp.experts.{}.down_proj", "feed_forward/expert_down"),
)

_GPT2 = TensorTable(
    prefix="transformer.",
    outer=(
        *_embedding("transformer.wte"),
        *_embedding("transformer.wpe", "position_embedding"),
        *_dense("lm_head", "head"),
        *_norm("transformer.ln_f", "final_norm"),
    ),
    block=(
        *_norm("ln_1", _ATTENTION_NORM),
        *_norm("ln_2", _FEED_FORWARD_NORM),
        *_dense("attn.c_attn", _QUERY, _KEY, _VALUE, kernel=CONV1D),
        *_dense("attn.c_proj", "attention/out", kernel=CONV1D_OUT),
        *_dense("mlp.c_fc", "feed_forward/up", kernel=CONV1D),
        *_dense("mlp.c_proj", "feed_forward/down", kernel=CONV1D),
    ),
    layer="transformer.h.{}.",
    head="lm_head.weight",
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
)
_GPT_NEOX = TensorTable(
    prefix="gpt_neox.",
    outer=(
        *_embedding("gpt_neox.embed_in"),
        *_dense("embed_out", "head"),
        *_norm("gpt_neox.final_layer_norm", "final_norm"),
    ),
    block=(
        *_LLAMA_PRE_NORMS,
        *_dense("attention.query_key_value", _QUERY, _KEY, _VALUE, kernel=LINEAR_PER_HEAD, bias=VECTOR_PER_HEAD),
        *_dense("attention.dense", "attention/out", kernel=LINEAR_OUT),
        *_dense("mlp.dense_h_to_4h", "feed_forward/up"),
        *_dense("mlp.dense_4h_to_h", "feed_forward/down"),
    ),
    layer="gpt_neox.layers.{}.",
    head="embed_out.weight",
    buffers=r"(layers\.\d+\.attention\.)?(bias|masked_bias|rotary_emb\.inv_freq)",
)
_OPT = TensorTable(
    prefix="model.",
    outer=(
        *_embedding("model.decoder.embed_tokens"),
        *_embedding("model.decoder.embed_positions", "position_embedding"),
        *_dense("lm_head", "head"),
        *_norm("model.decoder.final_layer_norm", "final_norm"),
    ),
    block=(
        *_norm("self_attn_layer_norm", _ATTENTION_NORM),
        *_norm("final_layer_norm", _FEED_FORWARD_NORM),
        *_SEPARATE_QKV,
        *_dense("self_attn.out_proj", "attention/out", kernel=LINEAR_OUT),
        *_dense("fc1", "feed_forward/up"),
        *_dense("fc2", "feed_forward/down"),
    ),
    layer="model.decoder.layers.{}.",
    head="lm_head.weight",
    buffers=r"(?!)",
)

# Of our own code, in pytorch/. Norms have our names, projections those of Llama.
_HYBRIDNORM_NORMS = tuple(
    tensor
    for sublayer in ("attention", "feed_forward")
    for which in ("pre", "branch", "post")
    for tensor in _norm(f"{sublayer}_{which}_norm", f"{sublayer}_{which}_norm")
)
_HYBRIDNORM_EXPERTS = tuple(
    Tensor(f"mlp.experts.{name}_{theirs}", (f"feed_forward/expert_{name}/{ours}",), AS_IT_IS)
    for name in ("gate", "up", "down")
    for theirs, ours in (("proj", "kernel"), ("bias", "bias"))
)
_HYBRIDNORM = TensorTable(
    prefix="model.",
    outer=(
        *_embedding("model.embed_tokens"),
        *_dense("lm_head", "head"),
        *_embedding("model.embed_positions", "position_embedding"),
        *_norm("model.embedding_norm", "embedding_norm"),
        *_norm("model.norm", "final_norm"),
    ),
    block=(
        *_HYBRIDNORM_NORMS,
        *_LLAMA_BRANCHES,
        *(tensor for name in HEAD_NORMS for tensor in _norm(f"self_attn.{name}", f"attention/{name}")),
        Tensor("self_attn.sinks", ("attention/sinks",), VECTOR),
        Tensor("attention_layer_scale.weight", ("attention_layer_scale/scale",), VECTOR),
        Tensor("feed_forward_layer_scale.weight", ("feed_forward_layer_scale/scale",), VECTOR),
        *_dense("mlp.router", "feed_forward/router"),
        Tensor("mlp.balance_bias", ("feed_forward/balance_bias",), VECTOR),
        *_HYBRIDNORM_EXPERTS,
        *_dense("mlp.shared.gate_proj", "feed_forward/shared/gate"),
        *_dense("mlp.shared.up_proj", "feed_forward/shared/up"),
        *_dense("mlp.shared.down_proj", "feed_forward/shared/down"),
        *_dense("mlp.shared_gate", "feed_forward/shared_gate"),
    ),
    layer="model.layers.{}.",
    head="lm_head.weight",
    buffers=r"(?!)",
)

TABLES: Mapping[str, TensorTable] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "llama": _LLAMA,
    "qwen3": dataclasses.replace(_LLAMA, block=_LLAMA_PRE_NORMS + _LLAMA_BRANCHES + _Q_K_NORMS),
    "olmo2": dataclasses.replace(_LLAMA, block=_LLAMA_BRANCHES + _Q_K_NORMS + _OLMO2_BRANCH_NORMS),
    "olmoe": dataclasses.replace(_LLAMA, block=_LLAMA_PRE_NORMS + _LLAMA_ATTENTION + _Q_K_NORMS + _OLMOE_EXPERTS),
    "hybridnorm": _HYBRIDNORM,
}
