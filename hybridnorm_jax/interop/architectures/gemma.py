"""The Gemmas: norms whose scale is stored as 1 + scale, an embedding times the root of its width."""

from hybridnorm_jax.interop.architectures.usual_keys import (
    GATED,
    RMS_NORM,
    TIED,
    Sizes,
    attention_bias,
    gated,
    rms_norm_eps,
    sizes,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import InverseRoot, Key, names, none
from hybridnorm_jax.interop.hf_config_rules import RootOfWidth
from hybridnorm_jax.interop.hf_layer_keys import Windows, alternate, every
from hybridnorm_jax.interop.hf_rope_keys import LayeredRope, Rope
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    FEED_FORWARD_NORM,
    GATED_MLP,
    attention,
    llama_table,
    norm,
    pre_norms,
    q_k_norms,
)

_TANH = "gelu_pytorch_tanh"
_NORMS = {**RMS_NORM, "norm_scale_plus_one": True}
_HEAD_DIM = Key("head_dim", ("head_dim",), 256)
_GEMMA = Architecture(
    name="gemma",
    class_name="GemmaForCausalLM",
    summary="norm scale stored as 1 + scale, embedding times the root of its width",
    constants={**_NORMS, "scheme": "pre"},
    keys=(
        *sizes(Sizes(vocab_size=256000, intermediate_size=24576, hidden_size=3072, layers=28, heads=16, kv_heads=16)),
        _HEAD_DIM,
        # The first releases wrote gelu where they meant the one with tanh, and transformers reads it so.
        Key("hidden_act", ("activation",), _TANH, words={_TANH: "geglu_tanh"} | GATED | {"gelu": "geglu_tanh"}),
        rms_norm_eps(1e-6),
        attention_bias(),
        TIED,
    ),
    rules=(RootOfWidth(), Rope(most_positions=8192)),
    tensors=llama_table(pre_norms(), attention(), GATED_MLP),
    fixed={"hidden_activation": lambda value, document: value in (None, document.get("hidden_act", _TANH))},
)
_SANDWICH_NORMS = (
    *norm("input_layernorm", ATTENTION_NORM),
    *norm("post_attention_layernorm", "attention_branch_norm"),
    *norm("pre_feedforward_layernorm", FEED_FORWARD_NORM),
    *norm("post_feedforward_layernorm", "feed_forward_branch_norm"),
)
_CAPPED = (
    InverseRoot("query_pre_attn_scalar", ("attention_scale",), 256, written="score_scale"),
    gated("hidden_activation", _TANH),
    rms_norm_eps(1e-6),
    attention_bias(),
    TIED,
)
_GEMMA2 = Architecture(
    name="gemma2",
    class_name="Gemma2ForCausalLM",
    summary="as Gemma, norms before and after each branch, soft caps, windows",
    constants={**_NORMS, "scheme": "sandwich"},
    keys=(
        *sizes(Sizes(vocab_size=256000, intermediate_size=9216, hidden_size=2304, layers=26, heads=8, kv_heads=4)),
        _HEAD_DIM,
        *_CAPPED,
        Key("final_logit_softcapping", ("logit_cap",), 30.0, null=none),
        Key("attn_logit_softcapping", ("score_cap",), 50.0, null=none),
    ),
    rules=(RootOfWidth(), Windows(4096, pattern=alternate(2)), Rope(most_positions=8192)),
    tensors=llama_table(_SANDWICH_NORMS, attention(), GATED_MLP),
    fixed={"hidden_act": lambda value, document: value in (None, document.get("hidden_activation", _TANH))},
    harmless=names("cache_implementation"),
)
_GEMMA3 = Architecture(
    name="gemma3_text",
    class_name="Gemma3ForCausalLM",
    summary="as Gemma 2 without caps, q and k normalized per head, a rotation of their own in windows",
    constants={**_NORMS, "scheme": "sandwich_qk"},
    keys=(
        *sizes(Sizes(vocab_size=262208, intermediate_size=9216, hidden_size=2304, layers=26, heads=8, kv_heads=4)),
        _HEAD_DIM,
        *_CAPPED,
        # attn_logit_softcapping must be null: the class has the key, and its attention passes over it.
        Key("final_logit_softcapping", ("logit_cap",), None, null=none, kind=float),
    ),
    rules=(
        RootOfWidth(),
        Windows(4096, pattern=every("sliding_window_pattern"), numbers={"sliding_window_pattern": 6}),
        LayeredRope(thetas=(1e6, 1e4), local="rope_local_base_freq", most_positions=131072),
    ),
    tensors=llama_table(_SANDWICH_NORMS, attention(), GATED_MLP, q_k_norms()),
    fixed={"hidden_act": lambda value, document: value in (None, document.get("hidden_activation", _TANH))},
    # The class writes the second, and reads it never.
    harmless=names("cache_implementation _sliding_window_pattern"),
)

ENTRIES = (_GEMMA, _GEMMA2, _GEMMA3)
