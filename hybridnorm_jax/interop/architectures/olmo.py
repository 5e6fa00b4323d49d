"""The four OLMos: the first, 2, 3 and the mixture of experts."""

from hybridnorm_jax.interop.architectures.usual_keys import (
    HEAD_DIM_OR_NULL,
    RMS_NORM,
    UNTIED,
    Sizes,
    attention_bias,
    gated,
    rms_norm_eps,
    sizes,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import Key, names, none
from hybridnorm_jax.interop.hf_layer_keys import Windows, alternate
from hybridnorm_jax.interop.hf_rope_keys import LayeredRope, Rope
from hybridnorm_jax.interop.tensor_parts import (
    GATED_MLP,
    attention,
    dense,
    experts,
    llama_table,
    norm,
    pre_norms,
    q_k_norms,
)

_SIZES = Sizes(vocab_size=50304, intermediate_size=11008)
_OLMO = Architecture(
    name="olmo",
    class_name="OlmoForCausalLM",
    summary="LayerNorm without scale and bias",
    constants={
        "norm": "layernorm",
        "norm_scale": False,
        "norm_bias": False,
        "norm_eps": 1e-5,
        "mlp_bias": False,
        "positions": "rope",
        "scheme": "pre",
    },
    keys=(
        *sizes(_SIZES),
        HEAD_DIM_OR_NULL,
        gated(),
        attention_bias(),
        Key("clip_qkv", ("qkv_clip",), None, null=none, kind=float),
        UNTIED,
    ),
    rules=(Rope(),),
    tensors=llama_table(attention(), GATED_MLP),
)
_BRANCH_NORMS = (
    *norm("post_attention_layernorm", "attention_branch_norm"),
    *norm("post_feedforward_layernorm", "feed_forward_branch_norm"),
)
_OLMO2_KEYS = (*sizes(_SIZES), HEAD_DIM_OR_NULL, gated(), rms_norm_eps(1e-5), attention_bias(), UNTIED)
_OLMO2_TENSORS = llama_table(attention(), GATED_MLP, q_k_norms(), _BRANCH_NORMS)
_OLMO2 = Architecture(
    name="olmo2",
    class_name="Olmo2ForCausalLM",
    summary="norms after the branches, q and k normalized over the projection",
    constants={**RMS_NORM, "scheme": "reordered"},
    keys=_OLMO2_KEYS,
    rules=(Rope(),),
    tensors=_OLMO2_TENSORS,
)
_OLMO3 = Architecture(
    name="olmo3",
    class_name="Olmo3ForCausalLM",
    summary="as OLMo 2, with windows and a rotation of their own in them",
    constants={**RMS_NORM, "scheme": "reordered"},
    keys=_OLMO2_KEYS,
    rules=(Windows(4096, pattern=alternate(4)), LayeredRope(thetas=(5e5, 5e5))),
    tensors=_OLMO2_TENSORS,
)
_OLMOE = Architecture(
    name="olmoe",
    class_name="OlmoeForCausalLM",
    summary="experts, q and k normalized over the projection",
    constants={**RMS_NORM, "scheme": "pre_qk_projection"},
    keys=(
        *sizes(Sizes(vocab_size=50304, intermediate_size=2048, hidden_size=2048, layers=16, heads=16)),
        gated(),
        rms_norm_eps(1e-5),
        attention_bias(),
        UNTIED,
        Key("num_experts", ("num_experts",), 64, least=1, alias="num_local_experts"),
        Key("num_experts_per_tok", ("experts_per_token",), 8),
        Key("norm_topk_prob", ("normalize_expert_weights",), False),
    ),
    rules=(Rope(most_positions=4096),),
    tensors=llama_table(
        pre_norms(),
        attention(),
        q_k_norms(),
        dense("mlp.gate", "feed_forward/router"),
        experts("mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
    ),
    # The loss in training alone reads them.
    harmless=names("output_router_logits router_aux_loss_coef"),
)

ENTRIES = (_OLMO2, _OLMOE, _OLMO, _OLMO3)
