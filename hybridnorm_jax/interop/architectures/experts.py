"""Mixtures of experts of Llama's shape: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss."""

from hybridnorm_jax.interop.architectures.usual_keys import (
    HEAD_DIM_OR_NULL,
    RMS_NORM,
    UNTIED,
    Sizes,
    attention_bias,
    gated,
    rms_norm_eps,
    sizes,
    without,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import Key, names
from hybridnorm_jax.interop.hf_layer_keys import DenseLayers, Windows, alternate, odd_layers_before
from hybridnorm_jax.interop.hf_rope_keys import Rope
from hybridnorm_jax.interop.tensor_layouts import ALTERNATING, AS_IT_IS
from hybridnorm_jax.interop.tensor_parts import (
    GATED_MLP,
    attention,
    dense,
    experts,
    llama_table,
    pre_norms,
    q_k_norms,
)
from hybridnorm_jax.interop.tensor_places import Tensor

# Training alone reads them.
_TRAINING = names("output_router_logits router_aux_loss_coef router_jitter_noise")
_EXPERTS = experts("mlp.experts.{}", "gate_proj", "up_proj", "down_proj")


_MIXTRAL = Architecture(
    name="mixtral",
    class_name="MixtralForCausalLM",
    summary="as Mistral, with experts",
    constants={**RMS_NORM, "scheme": "pre", "attention_bias": False, "normalize_expert_weights": True},
    keys=(
        *sizes(Sizes(vocab_size=32000, intermediate_size=14336, kv_heads=8)),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-5),
        UNTIED,
        Key("num_local_experts", ("num_experts",), 8, least=1, alias="num_experts"),
        Key("num_experts_per_tok", ("experts_per_token",), 2),
    ),
    rules=(Windows(None), Rope(default_theta=1e6, most_positions=131072)),
    tensors=llama_table(
        pre_norms(),
        attention(),
        dense("block_sparse_moe.gate", "feed_forward/router"),
        experts("block_sparse_moe.experts.{}", "w1", "w3", "w2"),
    ),
    harmless=_TRAINING,
)
_QWEN2_MOE = Architecture(
    name="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    summary="as Qwen2, with experts and a shared expert that has a gate",
    constants={
        **RMS_NORM,
        "scheme": "pre",
        "attention_output_bias": False,
        "shared_experts": 1,
        "shared_expert_gate": True,
    },
    keys=(
        *without(
            "intermediate_size",
            sizes(Sizes(vocab_size=151936, intermediate_size=0, hidden_size=2048, layers=24, heads=16, kv_heads=16)),
        ),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-6),
        UNTIED,
        Key("qkv_bias", ("attention_bias",), True),
        Key("moe_intermediate_size", ("mlp_dim",), 1408),
        Key("shared_expert_intermediate_size", ("shared_mlp_dim",), 5632, written="shared_width"),
        Key("num_experts", ("num_experts",), 60, least=1),
        Key("num_experts_per_tok", ("experts_per_token",), 4),
        Key("norm_topk_prob", ("normalize_expert_weights",), False),
    ),
    rules=(
        DenseLayers(5632),
        Windows(
            4096,
            is_optional=True,
            pattern=odd_layers_before("max_window_layers"),
            numbers={"max_window_layers": 28},
        ),
        Rope(most_positions=32768),
    ),
    tensors=llama_table(
        pre_norms(),
        attention(),
        GATED_MLP,
        dense("mlp.gate", "feed_forward/router"),
        _EXPERTS,
        dense("mlp.shared_expert.gate_proj", "feed_forward/shared/gate"),
        dense("mlp.shared_expert.up_proj", "feed_forward/shared/up"),
        dense("mlp.shared_expert.down_proj", "feed_forward/shared/down"),
        dense("mlp.shared_expert_gate", "feed_forward/shared_gate"),
    ),
    harmless=_TRAINING,
)
_QWEN3_MOE = Architecture(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    summary="as Qwen3, with experts in some layers or all",
    constants={**RMS_NORM, "scheme": "pre_qk_pre"},
    keys=(
        *without(
            "intermediate_size",
            sizes(Sizes(vocab_size=151936, intermediate_size=0, hidden_size=2048, layers=24, heads=32, kv_heads=4)),
        ),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-6),
        attention_bias(),
        UNTIED,
        Key("moe_intermediate_size", ("mlp_dim",), 768),
        Key("num_experts", ("num_experts",), 128, least=1, alias="num_local_experts"),
        Key("num_experts_per_tok", ("experts_per_token",), 8),
        Key("norm_topk_prob", ("normalize_expert_weights",), False),
    ),
    rules=(DenseLayers(6144), Windows(4096, is_optional=True), Rope(most_positions=32768)),
    tensors=llama_table(
        pre_norms(),
        attention(),
        q_k_norms(),
        GATED_MLP,
        dense("mlp.gate", "feed_forward/router"),
        _EXPERTS,
    ),
    harmless=_TRAINING | names("max_window_layers"),
)


def _expert_tensors() -> tuple[Tensor, ...]:
    """gpt-oss's experts, all in one tensor; gate and up alternate."""
    gate, up, down = (f"feed_forward/expert_{name}" for name in ("gate", "up", "down"))
    return (
        Tensor("mlp.experts.gate_up_proj", (f"{gate}/kernel", f"{up}/kernel"), ALTERNATING),
        Tensor("mlp.experts.gate_up_proj_bias", (f"{gate}/bias", f"{up}/bias"), ALTERNATING),
        Tensor("mlp.experts.down_proj", (f"{down}/kernel",), AS_IT_IS),
        Tensor("mlp.experts.down_proj_bias", (f"{down}/bias",), AS_IT_IS),
    )


_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
_GPT_OSS = Architecture(
    name="gpt_oss",
    class_name="GptOssForCausalLM",
    summary="experts with biases and clamped gates, attention sinks, windows in every other layer",
    constants={
        **RMS_NORM,
        "scheme": "pre",
        "attention_sinks": True,
        "activation": "swiglu_clamped",
        "mlp_bias": True,
        "router_bias": True,
        "normalize_expert_weights": True,
    },
    keys=(
        *sizes(Sizes(vocab_size=201088, intermediate_size=2880, hidden_size=2880, layers=36, heads=64, kv_heads=8)),
        Key("head_dim", ("head_dim",), 64),
        rms_norm_eps(1e-5),
        attention_bias(default=True),
        UNTIED,
        Key("swiglu_alpha", ("clamp_alpha",), 1.702),
        Key("swiglu_limit", ("clamp_limit",), 7.0),
        Key("num_local_experts", ("num_experts",), 128, least=1),
        Key("num_experts_per_tok", ("experts_per_token",), 4),
    ),
    rules=(
        Windows(128, pattern=alternate(2)),
        Rope(
            default_theta=150000.0,
            most_positions=131072,
            default={**_YARN, "truncate": False, "original_max_position_embeddings": 4096},
        ),
    ),
    tensors=llama_table(
        pre_norms(),
        attention(),
        (Tensor("self_attn.sinks", ("attention/sinks",), AS_IT_IS),),
        dense("mlp.router", "feed_forward/router"),
        _expert_tensors(),
    ),
    fixed={
        "hidden_act": "silu",
        "experts_per_token": lambda value, document: value == document.get("num_experts_per_tok", 4),
    },
    harmless=_TRAINING | names("initial_context_length"),
)

ENTRIES = (_MIXTRAL, _QWEN3_MOE, _QWEN2_MOE, _GPT_OSS)
