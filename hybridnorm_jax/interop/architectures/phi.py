"""Decoders with LayerNorm and RoPE, in most on a part of each head: Phi, StableLM, Persimmon, Nemotron, StarCoder2."""

from hybridnorm_jax.interop.architectures.usual_keys import (
    HEAD_DIM_OR_NULL,
    LAYER_NORM,
    MLP_BIAS,
    TIED,
    UNTIED,
    Sizes,
    attention_bias,
    gated,
    layer_norm_eps,
    sizes,
    ungated,
    without,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import Key, names
from hybridnorm_jax.interop.hf_config_rules import Choice
from hybridnorm_jax.interop.hf_layer_keys import Windows
from hybridnorm_jax.interop.hf_rope_keys import Rope
from hybridnorm_jax.interop.hf_rope_scaling import FRACTION
from hybridnorm_jax.interop.tensor_layouts import LINEAR_GROUPED, LINEAR_OUT, VECTOR_GROUPED
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    GATED_MLP,
    KEY,
    OUT,
    QUERY,
    VALUE,
    attention,
    dense,
    llama_table,
    norm,
    plain_mlp,
    pre_norms,
    q_k_norms,
)
from hybridnorm_jax.interop.tensor_places import Tensor

_CONSTANTS = {**LAYER_NORM, "positions": "rope"}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_Q_K_LAYERNORMS = q_k_norms("q_layernorm", "k_layernorm")
_PHI = Architecture(
    name="phi",
    class_name="PhiForCausalLM",
    summary="parallel with one norm, RoPE on a part of each head, biases",
    constants={**_CONSTANTS, **_BIASES, "head_bias": True},
    keys=(
        *sizes(Sizes(vocab_size=51200, intermediate_size=8192, hidden_size=2048, layers=24)),
        HEAD_DIM_OR_NULL,
        ungated("hidden_act", "gelu_new"),
        layer_norm_eps(),
        UNTIED,
    ),
    rules=(
        Choice(
            {"qk_layernorm": False},
            {(False,): {"scheme": "parallel_one_norm"}, (True,): {"scheme": "parallel_one_norm_qk"}},
        ),
        Rope(fraction=FRACTION, default_fraction=0.5),
    ),
    tensors=llama_table(
        norm("input_layernorm", ATTENTION_NORM),
        attention(out="dense"),
        _Q_K_LAYERNORMS,
        plain_mlp("mlp.fc1", "mlp.fc2"),
        norm_name="model.final_layernorm",
    ),
    harmless=names("embd_pdrop resid_pdrop"),
)


def _norms_per_head(name: str, leaf: str) -> tuple[Tensor, ...]:
    """A norm of every head; {} in the name stands for the head."""
    return norm(f"self_attn.{name}.norms.{{}}", leaf)


_QK = {"attention_norm_per_head": True, "attention_norm_bias": False}
_STABLELM = Architecture(
    name="stablelm",
    class_name="StableLmForCausalLM",
    summary="sequential, or parallel with one norm; RoPE on a part of each head, SwiGLU",
    constants={**_CONSTANTS, "attention_output_bias": False, "mlp_bias": False},
    keys=(
        *sizes(Sizes(vocab_size=50304, intermediate_size=6912, hidden_size=2560, kv_heads=32)),
        gated(),
        layer_norm_eps(),
        Key("use_qkv_bias", ("attention_bias",), False),
        UNTIED,
    ),
    rules=(
        Choice(
            {"use_parallel_residual": False, "qk_layernorm": False},
            {
                (False, False): {"scheme": "pre"},
                (False, True): {"scheme": "pre_qk_pre", **_QK},
                (True, False): {"scheme": "parallel_one_norm"},
                (True, True): {"scheme": "parallel_one_norm_qk", **_QK},
            },
        ),
        Rope(fraction=FRACTION, default_fraction=0.25, most_positions=4096),
    ),
    tensors=llama_table(
        pre_norms(),
        attention(),
        _norms_per_head("q_layernorm", "attention/q_norm"),
        _norms_per_head("k_layernorm", "attention/k_norm"),
        GATED_MLP,
    ),
)
_PERSIMMON = Architecture(
    name="persimmon",
    class_name="PersimmonForCausalLM",
    summary="q and k normalized per head, RoPE on a part of each head, squared ReLU",
    constants={**_CONSTANTS, **_BIASES},
    keys=(
        *without("num_key_value_heads", sizes(Sizes(vocab_size=262144, intermediate_size=16384, layers=36, heads=64))),
        ungated("hidden_act", "relu2"),
        layer_norm_eps(),
        UNTIED,
    ),
    rules=(
        Choice({"qk_layernorm": True}, {(True,): {"scheme": "pre_qk_pre"}, (False,): {"scheme": "pre"}}),
        Rope(fraction=FRACTION, default_fraction=0.5, most_positions=16384),
    ),
    tensors=llama_table(
        pre_norms(),
        dense("self_attn.query_key_value", QUERY, KEY, VALUE, kernel=LINEAR_GROUPED, bias=VECTOR_GROUPED),
        dense("self_attn.dense", OUT, kernel=LINEAR_OUT),
        _Q_K_LAYERNORMS,
        plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        norm_name="model.final_layernorm",
    ),
)
_NEMOTRON = Architecture(
    name="nemotron",
    class_name="NemotronForCausalLM",
    summary="norm scale stored as 1 + scale, RoPE on a part of each head, squared ReLU",
    constants={**_CONSTANTS, "scheme": "pre", "norm_scale_plus_one": True},
    keys=(
        *sizes(Sizes(vocab_size=256000, intermediate_size=24576, hidden_size=6144, heads=48)),
        HEAD_DIM_OR_NULL,
        ungated("hidden_act", "relu2"),
        Key("norm_eps", ("norm_eps",), 1e-5),
        attention_bias(),
        MLP_BIAS,
        UNTIED,
    ),
    rules=(Rope(fraction=FRACTION, default_fraction=0.5, most_positions=4096),),
    tensors=llama_table(pre_norms(), attention(), plain_mlp("mlp.up_proj", "mlp.down_proj")),
)
_STARCODER2 = Architecture(
    name="starcoder2",
    class_name="Starcoder2ForCausalLM",
    summary="RoPE, biases, a window",
    constants={**_CONSTANTS, "scheme": "pre"},
    keys=(
        *sizes(Sizes(vocab_size=49152, intermediate_size=12288, hidden_size=3072, layers=30, heads=24, kv_heads=2)),
        HEAD_DIM_OR_NULL,
        ungated("hidden_act", "gelu_pytorch_tanh"),
        Key("norm_epsilon", ("norm_eps",), 1e-5),
        Key("use_bias", ("attention_bias", "mlp_bias"), True),
        TIED,
    ),
    rules=(Windows(None), Rope(most_positions=4096)),
    tensors=llama_table(pre_norms(), attention(), plain_mlp("mlp.c_fc", "mlp.c_proj")),
    fixed={"norm_type": "layer_norm", "mlp_type": "default"},
    harmless=names("embedding_dropout residual_dropout"),
)

ENTRIES = (_PHI, _STABLELM, _PERSIMMON, _NEMOTRON, _STARCODER2)
