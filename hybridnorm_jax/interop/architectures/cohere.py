"""Command R of Cohere and its successor: parallel branches with one LayerNorm without bias, interleaved RoPE."""

from hybridnorm_jax.interop.architectures.usual_keys import (
    HEAD_DIM_OR_NULL,
    TIED,
    Sizes,
    attention_bias,
    gated,
    layer_norm_eps,
    sizes,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import Multiplier, names
from hybridnorm_jax.interop.hf_config_rules import Choice
from hybridnorm_jax.interop.hf_layer_keys import RotatingWhereWindowed, Windows, every
from hybridnorm_jax.interop.hf_rope_keys import Rope
from hybridnorm_jax.interop.tensor_layouts import AS_IT_IS
from hybridnorm_jax.interop.tensor_parts import ATTENTION_NORM, GATED_MLP, attention, llama_table, norm

_CONSTANTS = {"norm": "layernorm", "norm_bias": False, "mlp_bias": False, "positions": "rope"}
_KEYS = (
    *sizes(Sizes(vocab_size=256000, intermediate_size=22528, hidden_size=8192, layers=40, heads=64)),
    HEAD_DIM_OR_NULL,
    gated(),
    layer_norm_eps(),
    attention_bias(),
    Multiplier("logit_scale", ("logit_scale",), 0.0625),
    TIED,
)
_BLOCK = (*norm("input_layernorm", ATTENTION_NORM), *attention(paired=True), *GATED_MLP)
_PLAIN = {"scheme": "parallel_one_norm"}
_COHERE = Architecture(
    name="cohere",
    class_name="CohereForCausalLM",
    summary="parallel with one norm without bias, interleaved RoPE, scaled logits",
    constants=_CONSTANTS,
    keys=_KEYS,
    rules=(
        Choice(
            {"use_qk_norm": False},
            {(False,): _PLAIN, (True,): {"scheme": "parallel_one_norm_qk", "attention_norm_per_head": True}},
        ),
        Rope(default_theta=5e5, most_positions=8192),
    ),
    tensors=llama_table(
        _BLOCK,
        norm("self_attn.q_norm", "attention/q_norm", layout=AS_IT_IS, paired=True),
        norm("self_attn.k_norm", "attention/k_norm", layout=AS_IT_IS, paired=True),
    ),
)
_COHERE2 = Architecture(
    name="cohere2",
    class_name="Cohere2ForCausalLM",
    summary="as Cohere, RoPE in layers with a window alone",
    constants=_CONSTANTS | _PLAIN,
    keys=_KEYS,
    rules=(
        Windows(4096, pattern=every("sliding_window_pattern"), numbers={"sliding_window_pattern": 4}),
        Rope(most_positions=8192),
        RotatingWhereWindowed(),
    ),
    tensors=llama_table(_BLOCK),
    # As Cohere's own files say it; transformers reads none of them.
    fixed={
        "rotary_pct": 1.0,
        "position_embedding_type": "rope_gptj",
        "use_gated_activation": True,
        "use_parallel_block": True,
        "order_of_interleaved_layers": "local_attn_first",
    },
    harmless=names("cache_implementation layer_switch use_embedding_sharing use_parallel_embedding"),
)

ENTRIES = (_COHERE, _COHERE2)
