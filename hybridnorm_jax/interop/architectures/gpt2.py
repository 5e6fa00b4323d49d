"""GPT-2 and those that name their keys as it does: GPT-BigCode, GPT-Neo, GPT-J, CodeGen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.architectures.usual_keys import (
    LAYER_NORM,
    TIED,
    UNTIED,
    ungated,
)
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import MOST_LAYERS, MOST_POSITIONS, Json, Key, four_times, names
from hybridnorm_jax.interop.tensor_layouts import (
    CONV1D,
    CONV1D_OUT,
    LINEAR_GROUPED,
    LINEAR_OUT,
    VECTOR_GROUPED,
    Shards,
)
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    DOWN,
    KEY,
    OUT,
    QUERY,
    UP,
    VALUE,
    dense,
    embedding,
    norm,
    plain_mlp,
    pre_norms,
    separate_qkv,
)
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable
from hybridnorm_jax.model.config import ModelConfig

_SUMMARY = (
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "n_special predict_special_tokens output_past attn_pdrop embd_pdrop resid_pdrop"
)
# Scores are q k / sqrt(head_dim), or not divided at all.
_SCALED = Key("scale_attn_weights", ("attention_scale",), True, words={True: None, False: 1.0})


def _sizes(*, vocab_size: int = 50257, width: int = 768, layers: int = 12, heads: int = 12) -> tuple[Key, ...]:
    """The sizes by GPT-2's names, but for the number of positions; an absent key means these."""
    inner = four_times("n_embd", "hidden_size", default=width)
    return (
        Key("vocab_size", ("vocab_size",), vocab_size),
        Key("n_embd", ("d_model",), width, alias="hidden_size"),
        Key("n_layer", ("num_layers",), layers, most=MOST_LAYERS, alias="num_hidden_layers"),
        Key("n_head", ("num_heads",), heads, alias="num_attention_heads"),
        Key("n_inner", ("mlp_dim",), None, null=inner),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5),
    )


def _keys(activation: str) -> tuple[Key, ...]:
    """The keys of GPT-2 and GPT-BigCode, whose activations differ where none is stated."""
    return (
        *_sizes(),
        Key("n_positions", ("max_positions",), 1024, most=MOST_POSITIONS, alias="max_position_embeddings"),
        ungated("activation_function", activation),
        _SCALED,
        TIED,
    )


def _table(*block: tuple[Tensor, ...], buffers: str) -> TensorTable:
    """The tensors of a model that names what is outside its blocks as GPT-2 does."""
    return TensorTable(
        prefix="transformer.",
        outer=(
            *embedding("transformer.wte"),
            *embedding("transformer.wpe", "position_embedding"),
            *dense("lm_head", "head"),
            *norm("transformer.ln_f", "final_norm"),
        ),
        block=tuple(tensor for part in block for tensor in part),
        layer="transformer.h.{}.",
        head="lm_head.weight",
        buffers=buffers,
    )


_GPT2 = Architecture(
    name="gpt2",
    class_name="GPT2LMHeadModel",
    summary="learned positions",
    constants={**LAYER_NORM, "scheme": "pre", "positions": "learned", "attention_bias": True, "mlp_bias": True},
    keys=_keys("gelu_new"),
    tensors=_table(
        pre_norms("ln_1", "ln_2"),
        dense("attn.c_attn", QUERY, KEY, VALUE, kernel=CONV1D),
        dense("attn.c_proj", OUT, kernel=CONV1D_OUT),
        dense("mlp.c_fc", UP, kernel=CONV1D),
        dense("mlp.c_proj", DOWN, kernel=CONV1D),
        buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    fixed={"scale_attn_by_inverse_layer_idx": False},
    harmless=names(f"n_ctx reorder_and_upcast_attn {_SUMMARY}"),
)


@dataclasses.dataclass(frozen=True)
class _MultiQuery:
    """multi_query: all heads share one key and value. num_key_value_heads repeats what it means."""

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return ("multi_query", "num_key_value_heads")

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.num_kv_heads."""
        heads = 1 if Key("multi_query", (), True).read(document, source) else fields["num_heads"]
        stated = document.get("num_key_value_heads", heads)
        if stated != heads:
            raise UserError(f"{source}: num_key_value_heads={stated!r:.80}, but multi_query means {heads}")
        return {"num_kv_heads": heads}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """multi_query."""
        return {"multi_query": config.num_kv_heads == 1}


_GPT_BIGCODE = Architecture(
    name="gpt_bigcode",
    class_name="GPTBigCodeForCausalLM",
    summary="learned positions, one key and value for all heads",
    constants=_GPT2.constants,
    keys=_keys("gelu_pytorch_tanh"),
    rules=(_MultiQuery(),),
    tensors=_table(
        pre_norms("ln_1", "ln_2"),
        dense("attn.c_attn", QUERY, KEY, VALUE, kernel=LINEAR_GROUPED, bias=VECTOR_GROUPED),
        dense("attn.c_proj", OUT, kernel=LINEAR_OUT),
        plain_mlp("mlp.c_fc", "mlp.c_proj"),
        buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    # In which precision softmax is computed; ours is float32 at least.
    harmless=names(
        f"attention_softmax_in_fp32 scale_attention_softmax_in_fp32 n_ctx inference_runner pre_allocate_kv_cache "
        f"validate_runner_input max_batch_size max_sequence_length pad_key_length {_SUMMARY}"
    ),
)


@dataclasses.dataclass(frozen=True)
class _LocalLayers:
    """attention_types says which layers are local: a token sees window_size positions. attention_layers repeats it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return ("attention_types", "attention_layers", "window_size")

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.windows."""
        window = Key("window_size", (), 256, least=1).read(document, source)
        stated = document.get("attention_types")
        kinds = _expanded([[["global", "local"], 12]] if stated is None else stated, source)
        repeated = document.get("attention_layers")
        if repeated is not None and repeated != kinds:
            raise UserError(f"{source}: attention_layers={repeated!r:.80}: attention_types says something else")
        if len(kinds) != fields["num_layers"]:
            wrong = f"{len(kinds)} layers, but num_layers={fields['num_layers']}"
            raise UserError(f"{source}: attention_types: {wrong}")
        windows = tuple(window if kind == "local" else 0 for kind in kinds)
        return {"windows": windows if any(windows) else ()}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; where its windows differ, one of them."""
        kinds = ["local" if window else "global" for window in config.layer_windows]
        return {"attention_types": [[kinds, 1]], "window_size": max(config.layer_windows) or 256}


def _expanded(stated: Any, source: str) -> list[str]:
    """The kind of each layer, of [[kinds, how often], ...]."""
    kinds: list[str] = []
    for part in stated if isinstance(stated, list) else [None]:
        is_part = isinstance(part, list) and len(part) == 2 and isinstance(part[0], list) and type(part[1]) is int
        if not is_part or any(kind not in ("global", "local") for kind in part[0]) or part[1] > MOST_LAYERS:
            right = "must be a list of [kinds, how often], where a kind is global or local"
            raise UserError(f"{source}: attention_types={stated!r:.80} {right}")
        kinds += part[0] * part[1]
    return kinds


_GPT_NEO = Architecture(
    name="gpt_neo",
    class_name="GPTNeoForCausalLM",
    summary="learned positions, scores that are not scaled, local layers",
    constants={
        **LAYER_NORM,
        "scheme": "pre",
        "positions": "learned",
        "attention_bias": False,
        "attention_output_bias": True,
        "attention_scale": 1.0,
        "mlp_bias": True,
    },
    keys=(
        Key("vocab_size", ("vocab_size",), 50257),
        Key("hidden_size", ("d_model",), 2048),
        Key("num_layers", ("num_layers",), 24, most=MOST_LAYERS, alias="num_hidden_layers"),
        Key("num_heads", ("num_heads",), 16, alias="num_attention_heads"),
        Key("intermediate_size", ("mlp_dim",), None, null=four_times("hidden_size", default=2048)),
        Key("max_position_embeddings", ("max_positions",), 2048, most=MOST_POSITIONS),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5),
        ungated("activation_function", "gelu_new"),
        TIED,
    ),
    rules=(_LocalLayers(),),
    tensors=_table(
        pre_norms("ln_1", "ln_2"),
        separate_qkv("attn.attention"),
        dense("attn.attention.out_proj", OUT, kernel=LINEAR_OUT),
        plain_mlp("mlp.c_fc", "mlp.c_proj"),
        buffers=r"h\.\d+\.attn\.attention\.(bias|masked_bias)",
    ),
    harmless=names(f"resid_dropout embed_dropout {_SUMMARY}"),
)

_GPTJ = Architecture(
    name="gptj",
    class_name="GPTJForCausalLM",
    summary="parallel with one norm, interleaved RoPE on a part of each head",
    constants={
        **LAYER_NORM,
        "scheme": "parallel_one_norm",
        "positions": "rope",
        "attention_bias": False,
        "mlp_bias": True,
        "head_bias": True,
    },
    keys=(
        *_sizes(vocab_size=50400, width=4096, layers=28, heads=16),
        Key("rotary_dim", ("rotary_dim",), 64, written="rotary_width"),
        ungated("activation_function", "gelu_new"),
        UNTIED,
    ),
    tensors=_table(
        norm("ln_1", ATTENTION_NORM),
        separate_qkv("attn", paired=True),
        dense("attn.out_proj", OUT, kernel=LINEAR_OUT),
        plain_mlp("mlp.fc_in", "mlp.fc_out"),
        buffers=r"h\.\d+\.attn\.(bias|masked_bias|embed_positions)",
    ),
    fixed={"scale_attn_weights": True, "rotary": True},
    harmless=names(f"n_positions n_ctx {_SUMMARY}"),
)


@dataclasses.dataclass(frozen=True)
class _FourShards:
    """The projection of q, k and v is that of four machines, each with a quarter of the channels."""

    @property
    def names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing, where the channels can be divided."""
        if fields["d_model"] % 4:
            right = "four shards must divide the width"
            raise UserError(f"{source}: n_embd={fields['d_model']}: {right}")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


_CODEGEN = dataclasses.replace(
    _GPTJ,
    name="codegen",
    class_name="CodeGenForCausalLM",
    summary="as GPT-J, the projection of q, v and k in four shards",
    rules=(_FourShards(),),
    tensors=_table(
        norm("ln_1", ATTENTION_NORM),
        dense(
            "attn.qkv_proj",
            QUERY,
            VALUE,
            KEY,
            kernel=Shards(inputs=1, transposed=True, count=4),
            bias=Shards(count=4),
            paired=True,
        ),
        dense("attn.out_proj", OUT, kernel=LINEAR_OUT),
        plain_mlp("mlp.fc_in", "mlp.fc_out"),
        buffers=r"h\.\d+\.attn\.(causal_mask|bias|masked_bias|embed_positions)",
    ),
)

ENTRIES = (_GPT2, _GPT_BIGCODE, _GPT_NEO, _GPTJ, _CODEGEN)
