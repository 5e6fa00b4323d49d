"""Llama and those of its shape: Mistral, Qwen2, Qwen3, SmolLM3, Granite, Phi-3, GLM-4."""

from hybridnorm_jax.interop.architectures.usual_keys import (
    HEAD_DIM_OR_NULL,
    MLP_BIAS,
    RMS_NORM,
    TIED,
    UNTIED,
    Sizes,
    attention_bias,
    gated,
    rms_norm_eps,
    sizes,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import Inverse, Key, Multiplier, names
from hybridnorm_jax.interop.hf_layer_keys import NoRopeLayers, Windows, from_layer, without_rotation
from hybridnorm_jax.interop.hf_rope_keys import Rope
from hybridnorm_jax.interop.hf_rope_scaling import FRACTION
from hybridnorm_jax.interop.tensor_layouts import LINEAR_OUT
from hybridnorm_jax.interop.tensor_parts import (
    FUSED_GATED_MLP,
    GATED_MLP,
    KEY,
    OUT,
    QUERY,
    VALUE,
    attention,
    dense,
    llama_table,
    norm,
    pre_norms,
    q_k_norms,
)

_TABLE = llama_table(pre_norms(), attention(), GATED_MLP)
_LLAMA = Architecture(
    name="llama",
    class_name="LlamaForCausalLM",
    summary="RMSNorm, SwiGLU, RoPE",
    constants={**RMS_NORM, "scheme": "pre"},
    keys=(
        *sizes(Sizes(vocab_size=32000, intermediate_size=11008)),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-6),
        attention_bias(),
        MLP_BIAS,
        UNTIED,
    ),
    rules=(Rope(),),
    tensors=_TABLE,
    harmless=names("pretraining_tp is_llama_config"),
)
_MISTRAL = Architecture(
    name="mistral",
    class_name="MistralForCausalLM",
    summary="as Llama, with a window",
    constants={**RMS_NORM, "scheme": "pre", "attention_bias": False},
    keys=(
        *sizes(Sizes(vocab_size=32000, intermediate_size=14336, kv_heads=8)),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-6),
        UNTIED,
    ),
    rules=(Windows(4096), Rope(most_positions=131072)),
    tensors=_TABLE,
)
_QWEN_WINDOWS = Windows(
    4096, is_optional=True, pattern=from_layer("max_window_layers"), numbers={"max_window_layers": 28}
)
_QWEN2 = Architecture(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    summary="as Llama, with biases of q, k and v, windows in later layers",
    constants={**RMS_NORM, "scheme": "pre", "attention_bias": True, "attention_output_bias": False},
    keys=(
        *sizes(Sizes(vocab_size=151936, intermediate_size=22016, kv_heads=32)),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-6),
        UNTIED,
    ),
    rules=(_QWEN_WINDOWS, Rope(most_positions=32768)),
    tensors=_TABLE,
)
_QWEN3 = Architecture(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    summary="as Llama, q and k normalized per head",
    constants={**RMS_NORM, "scheme": "pre_qk_pre"},
    keys=(
        *sizes(Sizes(vocab_size=151936, intermediate_size=22016, kv_heads=32)),
        Key("head_dim", ("head_dim",), 128),
        gated(),
        rms_norm_eps(1e-6),
        attention_bias(),
        UNTIED,
    ),
    rules=(_QWEN_WINDOWS, Rope(most_positions=32768)),
    tensors=llama_table(pre_norms(), attention(), GATED_MLP, q_k_norms()),
)
_SMOLLM3 = Architecture(
    name="smollm3",
    class_name="SmolLM3ForCausalLM",
    summary="as Llama, some layers without RoPE",
    constants={**RMS_NORM, "scheme": "pre"},
    keys=(
        *sizes(Sizes(vocab_size=128256, intermediate_size=11008, hidden_size=2048, layers=36, heads=16, kv_heads=4)),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-6),
        attention_bias(),
        MLP_BIAS,
        TIED,
    ),
    rules=(
        Rope(default_theta=2e6, most_positions=32768),
        NoRopeLayers(interval=4),
        Windows(None, is_optional=True, pattern=without_rotation),
    ),
    tensors=_TABLE,
    harmless=names("pretraining_tp max_window_layers"),
)
_GRANITE = Architecture(
    name="granite",
    class_name="GraniteForCausalLM",
    summary="as Llama, with four multipliers",
    constants={**RMS_NORM, "scheme": "pre"},
    keys=(
        *sizes(Sizes(vocab_size=32000, intermediate_size=11008)),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-6),
        attention_bias(),
        MLP_BIAS,
        UNTIED,
        Multiplier("embedding_multiplier", ("embedding_scale",), 1.0),
        Inverse("logits_scaling", ("logit_scale",), 1.0),
        Key("residual_multiplier", ("branch_multiplier",), 1.0),
        Key("attention_multiplier", ("attention_scale",), 1.0, written="score_scale"),
    ),
    rules=(Rope(),),
    tensors=_TABLE,
)
_PHI3 = Architecture(
    name="phi3",
    class_name="Phi3ForCausalLM",
    summary="as Llama, with fused projections, a window, LongRoPE",
    constants={**RMS_NORM, "scheme": "pre", "attention_bias": False},
    keys=(
        *sizes(Sizes(vocab_size=32064, intermediate_size=8192, hidden_size=3072)),
        HEAD_DIM_OR_NULL,
        gated(),
        rms_norm_eps(1e-5),
        UNTIED,
    ),
    rules=(
        Windows(None),
        Rope(
            fraction=FRACTION,
            most_positions=4096,
            types=("default", "longrope"),
            renamed={"su": "longrope"},
            original=4096,
        ),
    ),
    tensors=llama_table(
        pre_norms(),
        dense("self_attn.qkv_proj", QUERY, KEY, VALUE),
        dense("self_attn.o_proj", OUT, kernel=LINEAR_OUT),
        FUSED_GATED_MLP,
    ),
    harmless=names("embd_pdrop resid_pdrop"),
)
_GLM4 = Architecture(
    name="glm4",
    class_name="Glm4ForCausalLM",
    summary="norms before and after each branch, interleaved RoPE on a part of each head",
    constants={**RMS_NORM, "scheme": "sandwich", "attention_output_bias": False},
    keys=(
        *sizes(Sizes(vocab_size=151552, intermediate_size=13696, layers=40, kv_heads=2)),
        Key("head_dim", ("head_dim",), 128),
        gated(),
        rms_norm_eps(1.5625e-07),
        attention_bias(default=True),
        UNTIED,
    ),
    rules=(Rope(fraction=FRACTION, default_fraction=0.5, most_positions=131072),),
    tensors=llama_table(
        pre_norms(),
        norm("post_self_attn_layernorm", "attention_branch_norm"),
        norm("post_mlp_layernorm", "feed_forward_branch_norm"),
        attention(paired=True),
        FUSED_GATED_MLP,
    ),
)

ENTRIES = (_LLAMA, _QWEN3, _QWEN2, _MISTRAL, _SMOLLM3, _GRANITE, _PHI3, _GLM4)
