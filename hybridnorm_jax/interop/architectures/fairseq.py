"""The decoders that come from fairseq: OPT, XGLM, BioGPT."""

from hybridnorm_jax.interop.architectures.usual_keys import LAYER_NORM, TIED, ungated
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import MOST_LAYERS, MOST_POSITIONS, Key, names
from hybridnorm_jax.interop.hf_config_rules import RootOfWidth
from hybridnorm_jax.interop.tensor_layouts import LINEAR_OUT
from hybridnorm_jax.interop.tensor_parts import (
    NO_BUFFERS,
    OUT,
    dense,
    embedding,
    norm,
    plain_mlp,
    pre_norms,
    separate_qkv,
)
from hybridnorm_jax.interop.tensor_places import TensorTable


def _table(prefix: str, decoder: str, head: str, last_norm: str) -> TensorTable:
    """The tensors of a decoder of fairseq.

    Args:
      prefix: of the model without its head.
      decoder: stands before the names of the decoder.
      head: name of the head.
      last_norm: name of the norm before it.
    """
    return TensorTable(
        prefix=prefix,
        outer=(
            *embedding(f"{decoder}embed_tokens"),
            *embedding(f"{decoder}embed_positions", "position_embedding"),
            *dense(head, "head"),
            *norm(f"{decoder}{last_norm}", "final_norm"),
        ),
        block=(
            *pre_norms("self_attn_layer_norm", "final_layer_norm"),
            *separate_qkv(),
            *dense("self_attn.out_proj", OUT, kernel=LINEAR_OUT),
            *plain_mlp("fc1", "fc2"),
        ),
        layer=decoder + "layers.{}.",
        head=f"{head}.weight",
        buffers=NO_BUFFERS,
    )


_DROPOUT = names("dropout activation_dropout layerdrop init_std")
_OPT = Architecture(
    name="opt",
    class_name="OPTForCausalLM",
    summary="learned positions, the first at row 2",
    constants={
        "norm": "layernorm",
        "scheme": "pre",
        "norm_eps": 1e-5,
        "positions": "learned",
        "position_offset": 2,
    },
    keys=(
        Key("vocab_size", ("vocab_size",), 50272),
        Key("hidden_size", ("d_model",), 768),
        Key("num_hidden_layers", ("num_layers",), 12, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), 12),
        Key("ffn_dim", ("mlp_dim",), 3072),
        Key("max_position_embeddings", ("max_positions",), 2048, most=MOST_POSITIONS),
        ungated("activation_function", "relu"),
        Key("enable_bias", ("attention_bias", "mlp_bias"), True),
        Key("layer_norm_elementwise_affine", ("norm_scale", "norm_bias"), True),
        TIED,
    ),
    tensors=_table("model.", "model.decoder.", "lm_head", "final_layer_norm"),
    fixed={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": lambda value, document: value in (None, document.get("hidden_size", 768)),
    },
    harmless=_DROPOUT,
)
_XGLM = Architecture(
    name="xglm",
    class_name="XGLMForCausalLM",
    summary="sinusoidal positions, the first at row 2",
    constants={
        **LAYER_NORM,
        "scheme": "pre",
        "norm_eps": 1e-5,  # whatever layer_norm_eps says
        "positions": "sinusoidal",
        "position_offset": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    keys=(
        Key("vocab_size", ("vocab_size",), 256008),
        Key("d_model", ("d_model",), 1024, alias="hidden_size"),
        Key("num_layers", ("num_layers",), 24, most=MOST_LAYERS, alias="num_hidden_layers"),
        Key("attention_heads", ("num_heads",), 16, alias="num_attention_heads"),
        Key("ffn_dim", ("mlp_dim",), 4096),
        Key("max_position_embeddings", ("max_positions",), 2048, most=MOST_POSITIONS),
        ungated("activation_function", "gelu"),
        TIED,
    ),
    rules=(RootOfWidth("scale_embedding"),),
    tensors=_table("model.", "model.", "lm_head", "layer_norm"),
    # The row of this number in the table of positions is 0, and positions begin at row 2.
    fixed={"pad_token_id": lambda value, document: value in (None, 0, 1)},
    harmless=_DROPOUT | names("layer_norm_eps"),
)
_BIOGPT = Architecture(
    name="biogpt",
    class_name="BioGptForCausalLM",
    summary="learned positions, the first at row 2",
    constants={
        **LAYER_NORM,
        "scheme": "pre",
        "norm_eps": 1e-5,  # whatever layer_norm_eps says
        "positions": "learned",
        "position_offset": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    keys=(
        Key("vocab_size", ("vocab_size",), 42384),
        Key("hidden_size", ("d_model",), 1024),
        Key("num_hidden_layers", ("num_layers",), 24, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), 16),
        Key("intermediate_size", ("mlp_dim",), 4096),
        Key("max_position_embeddings", ("max_positions",), 1024, most=MOST_POSITIONS),
        ungated("hidden_act", "gelu"),
        TIED,
    ),
    rules=(RootOfWidth("scale_embedding"),),
    tensors=_table("biogpt.", "biogpt.", "output_projection", "layer_norm"),
    harmless=_DROPOUT | names("layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob"),
)

ENTRIES = (_OPT, _XGLM, _BIOGPT)
