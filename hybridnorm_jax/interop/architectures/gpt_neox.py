"""GPT-NeoX, and with it Pythia."""

from hybridnorm_jax.interop.architectures.usual_keys import LAYER_NORM, UNTIED, layer_norm_eps, ungated
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import MOST_LAYERS, Key
from hybridnorm_jax.interop.hf_config_rules import Choice
from hybridnorm_jax.interop.hf_rope_keys import Rope
from hybridnorm_jax.interop.tensor_layouts import LINEAR_GROUPED, LINEAR_OUT, VECTOR_GROUPED
from hybridnorm_jax.interop.tensor_parts import (
    KEY,
    OUT,
    QUERY,
    VALUE,
    dense,
    embedding,
    norm,
    plain_mlp,
    pre_norms,
)
from hybridnorm_jax.interop.tensor_places import TensorTable

_GPT_NEOX = Architecture(
    name="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    summary="parallel with two norms or sequential, RoPE on a part of each head",
    constants={**LAYER_NORM, "positions": "rope", "mlp_bias": True},
    keys=(
        Key("vocab_size", ("vocab_size",), 50432),
        Key("hidden_size", ("d_model",), 6144),
        Key("num_hidden_layers", ("num_layers",), 44, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), 64),
        Key("intermediate_size", ("mlp_dim",), 24576),
        ungated("hidden_act", "gelu"),
        layer_norm_eps(),
        Key("attention_bias", ("attention_bias",), True),
        UNTIED,
    ),
    rules=(
        Choice({"use_parallel_residual": True}, {(True,): {"scheme": "parallel"}, (False,): {"scheme": "pre"}}),
        Rope(
            theta="rotary_emb_base",
            fraction="rotary_pct",
            default_fraction=0.25,
            # transformers 4.43 to 4.57 wrote both names; neither reads these two.
            restated={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        ),
    ),
    tensors=TensorTable(
        prefix="gpt_neox.",
        outer=(
            *embedding("gpt_neox.embed_in"),
            *dense("embed_out", "head"),
            *norm("gpt_neox.final_layer_norm", "final_norm"),
        ),
        block=(
            *pre_norms(),
            *dense("attention.query_key_value", QUERY, KEY, VALUE, kernel=LINEAR_GROUPED, bias=VECTOR_GROUPED),
            *dense("attention.dense", OUT, kernel=LINEAR_OUT),
            *plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        layer="gpt_neox.layers.{}.",
        head="embed_out.weight",
        buffers=r"(layers\.\d+\.attention\.)?(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
)

ENTRIES = (_GPT_NEOX,)
