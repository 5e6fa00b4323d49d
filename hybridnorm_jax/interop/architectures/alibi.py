"""Decoders with ALiBi: BLOOM, MPT, and Falcon, which has RoPE in most of its models."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.architectures.usual_keys import LAYER_NORM, TIED, ungated
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_common_keys import COMMON_FIXED, COMMON_HARMLESS
from hybridnorm_jax.interop.hf_config_keys import MOST_LAYERS, Json, Key, four_times, head_dim_of, names, none
from hybridnorm_jax.interop.hf_config_rules import TimesTheWidth
from hybridnorm_jax.interop.hf_rope_keys import Rope
from hybridnorm_jax.interop.tensor_layouts import LINEAR_GROUPED, LINEAR_OUT, VECTOR_GROUPED
from hybridnorm_jax.interop.tensor_parts import (
    ATTENTION_NORM,
    FEED_FORWARD_NORM,
    KEY,
    NO_BUFFERS,
    OUT,
    QUERY,
    VALUE,
    dense,
    embedding,
    norm,
    only,
    plain_mlp,
    pre_norms,
)
from hybridnorm_jax.interop.tensor_places import Tensor, TensorTable
from hybridnorm_jax.model.config import ModelConfig

_FUSED_ATTENTION = (
    *dense("self_attention.query_key_value", QUERY, KEY, VALUE, kernel=LINEAR_GROUPED, bias=VECTOR_GROUPED),
    *dense("self_attention.dense", OUT, kernel=LINEAR_OUT),
)
_MLP = plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def _table(block: tuple[Tensor, ...]) -> TensorTable:
    return TensorTable(
        prefix="transformer.",
        outer=(
            *embedding("transformer.word_embeddings"),
            *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
            *dense("lm_head", "head"),
            *norm("transformer.ln_f", "final_norm"),
        ),
        block=block,
        layer="transformer.h.{}.",
        head="lm_head.weight",
        buffers=r"(h\.\d+\.self_attention\.)?rotary_emb\.inv_freq",
    )


_BLOOM = Architecture(
    name="bloom",
    class_name="BloomForCausalLM",
    summary="ALiBi, a norm on the embedding",
    constants={
        **LAYER_NORM,
        "scheme": "pre",
        "embedding_norm": "true",
        "positions": "alibi",
        "activation": "gelu_tanh",
        "attention_bias": True,
        "mlp_bias": True,
    },
    keys=(
        Key("vocab_size", ("vocab_size",), 250880),
        Key("hidden_size", ("d_model",), 64, alias="n_embed"),
        Key("n_layer", ("num_layers",), 2, most=MOST_LAYERS, alias="num_hidden_layers"),
        Key("n_head", ("num_heads",), 8, alias="num_attention_heads"),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5),
        TIED,
    ),
    rules=(TimesTheWidth(4),),
    tensors=_table((*pre_norms(), *_FUSED_ATTENTION, *_MLP)),
    fixed={"apply_residual_connection_post_layernorm": False, "n_inner": None},
    # In which order a machine sums, and how it did in training.
    harmless=names(
        "pretraining_tp slow_but_exact seq_length attention_softmax_in_fp32 masked_softmax_fusion bias_dropout_fusion "
        "skip_bias_add skip_bias_add_qkv offset_alibi"
    ),
)


@dataclasses.dataclass(frozen=True)
class _AttentionOfMpt:
    """attn_config: a mapping with what decides attention."""

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return ("attn_config",)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.attention_scale and model.qkv_clip."""
        stated = document.get("attn_config")
        if stated is not None and not isinstance(stated, Mapping):
            raise UserError(f"{source}: attn_config={stated!r:.80} must be a mapping")
        within = f"{source}: attn_config"
        for name, value in (stated or {}).items():
            self._check(name, value, within)
        found = {}
        for name, field in (("softmax_scale", "attention_scale"), ("clip_qkv", "qkv_clip")):
            found[field] = Key(name, (), None, null=none, kind=float).read(stated or {}, within)
        return found

    def _check(self, name: str, value: Any, within: str) -> None:
        # transformers always adds ALiBi with slopes up to 2^-8 and has no norms of q and k, whatever the file says.
        fixed = {"alibi": True, "alibi_bias_max": 8, "qk_ln": False, "prefix_lm": False}
        fixed |= {"attn_type": "multihead_attention"}
        if name in fixed and value != fixed[name]:
            raise UserError(f"{within}.{name}={value!r:.80} is not implemented for mpt")
        known = names("softmax_scale clip_qkv attn_impl attn_pdrop attn_uses_sequence_id model_type")
        if name not in fixed and name not in known | COMMON_HARMLESS | set(COMMON_FIXED):
            raise UserError(f"{within}.{name}={value!r:.80} is not known for mpt")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The key of a model."""
        default = 1 / math.sqrt(config.head_dim)
        scale = None if config.score_scale == default else config.score_scale
        return {"attn_config": {"softmax_scale": scale, "clip_qkv": config.qkv_clip, "alibi": True}}


_MPT = Architecture(
    name="mpt",
    class_name="MptForCausalLM",
    summary="ALiBi, no biases, q, k and v clipped in some models",
    constants={
        "norm": "layernorm",
        "norm_bias": False,
        "scheme": "pre",
        "positions": "alibi",
        "activation": "gelu",
        "attention_bias": False,
        "mlp_bias": False,
    },
    keys=(
        Key("vocab_size", ("vocab_size",), 50368),
        Key("d_model", ("d_model",), 2048, alias="hidden_size"),
        Key("n_layers", ("num_layers",), 24, most=MOST_LAYERS, alias="num_hidden_layers"),
        Key("n_heads", ("num_heads",), 16, alias="num_attention_heads"),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5),
        TIED,
    ),
    rules=(TimesTheWidth(4), _AttentionOfMpt()),
    tensors=TensorTable(
        prefix="transformer.",
        outer=(
            *embedding("transformer.wte"),
            *dense("lm_head", "head"),
            *norm("transformer.norm_f", "final_norm"),
        ),
        block=(
            *pre_norms("norm_1", "norm_2"),
            *dense("attn.Wqkv", QUERY, KEY, VALUE),
            *dense("attn.out_proj", OUT, kernel=LINEAR_OUT),
            *plain_mlp("ffn.up_proj", "ffn.down_proj"),
        ),
        layer="transformer.blocks.{}.",
        head="lm_head.weight",
        buffers=NO_BUFFERS,
    ),
    fixed={
        "expansion_ratio": 4,
        "no_bias": True,
        "logit_scale": None,
        "embedding_fraction": 1.0,
        "norm_type": "low_precision_layernorm",
    },
    # There are no learned positions, whatever the file says.
    harmless=names("learned_pos_emb max_seq_len resid_pdrop emb_pdrop init_device init_config verbose"),
)


# ---- Falcon.


def _has_two_norms(config: ModelConfig) -> bool:
    """Whether both branches of a parallel block have a norm of their own."""
    block = config.placements[0]
    return block.feed_forward.reads == "block" and not block.shared_pre_norm


def _has_one_norm(config: ModelConfig) -> bool:
    return not _has_two_norms(config)


# How often transformers 5.24 adds ALiBi to the scores of Falcon, by the way it computes attention: its plain one has it
# in the mask as well. Models were trained with once.
_HOW = "attn_implementation"
_TIMES = {"sdpa": 1, "eager": 2}


def _times_added(document: Json, source: str) -> int:
    stated = document.get(_HOW)
    if stated not in _TIMES:
        right = "transformers adds ALiBi once to Falcon's scores with sdpa, as in training, and twice with eager"
        raise UserError(f"{source}: {_HOW}={stated!r:.80} with alibi=True: {right}; add to the file which is meant")
    return _TIMES[str(stated)]


@dataclasses.dataclass(frozen=True)
class _FalconBlocks:
    """How many norms a block has and whether its branches are parallel, how many keys, and ALiBi or RoPE."""

    rope: Rope = Rope()
    schemes = ("parallel_one_norm", "parallel", "pre")

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        blocks = ("new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn")
        return (*blocks, "multi_query", "num_kv_heads", "alibi", _HOW, *self.rope.names)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.scheme, model.num_kv_heads, and the fields of positions."""
        is_new = Key("new_decoder_architecture", (), False).read(document, source)
        found = {"scheme": self._scheme(document, source, is_new=is_new)}
        found["num_kv_heads"] = self._kv_heads(document, source, fields["num_heads"], is_new=is_new)
        rotation = self.rope.read(document, source, fields)
        if not Key("alibi", (), False).read(document, source):
            return found | rotation | {"positions": "rope"}
        # ALiBi is added before the scores are scaled.
        scale = _times_added(document, source) / math.sqrt(head_dim_of(fields) or 1)
        return found | {"positions": "alibi", "alibi_scale": scale, "alibi_bfloat16": True}

    def _scheme(self, document: Json, source: str, *, is_new: bool) -> str:
        is_parallel = Key("parallel_attn", (), True).read(document, source)
        stated = Key("num_ln_in_parallel_attn", (), None, null=none).read(document, source)
        count = 2 if stated is None and is_new else stated
        if not is_parallel and not is_new:
            return "pre"
        if is_new and not is_parallel:
            raise UserError(f"{source}: parallel_attn=False: not with new_decoder_architecture")
        if count not in ((1, 2) if is_new else (None, 1)):
            raise UserError(f"{source}: num_ln_in_parallel_attn={stated}: not implemented with these blocks")
        return "parallel" if count == 2 else "parallel_one_norm"

    def _kv_heads(self, document: Json, source: str, heads: int, *, is_new: bool) -> int:
        stated = Key("num_kv_heads", (), None, null=none, least=1).read(document, source)
        if is_new:
            return heads if stated is None else int(stated)
        if Key("multi_query", (), True).read(document, source):
            return 1  # whatever num_kv_heads says
        if stated not in (None, heads):
            right = "each head has a key of its own with multi_query=False"
            raise UserError(f"{source}: num_kv_heads={stated}: {right}")
        return heads

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model."""
        has_few = config.num_kv_heads not in (1, config.num_heads)
        is_new = _has_two_norms(config) or (has_few and config.scheme != "pre")
        keys: dict[str, Any] = {
            "new_decoder_architecture": is_new,
            "parallel_attn": config.scheme != "pre",
            "multi_query": config.num_kv_heads == 1,
            "num_kv_heads": config.num_kv_heads if is_new else None,
            "alibi": config.positions == "alibi",
        }
        if is_new:
            keys["num_ln_in_parallel_attn"] = 2 if _has_two_norms(config) else 1
        if config.positions != "alibi":
            return keys | self.rope.write(config)
        is_twice = config.alibi_scale == _TIMES["eager"] / math.sqrt(config.head_dim)
        return keys | {_HOW: "eager" if is_twice else "sdpa"}


_FALCON = Architecture(
    name="falcon",
    class_name="FalconForCausalLM",
    summary="parallel with one norm or two, or sequential; RoPE or ALiBi",
    constants=LAYER_NORM,
    keys=(
        Key("vocab_size", ("vocab_size",), 65024),
        Key("hidden_size", ("d_model",), 4544, alias="n_embed"),
        Key("num_hidden_layers", ("num_layers",), 32, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), 71),
        Key("ffn_hidden_size", ("mlp_dim",), None, null=four_times("hidden_size", "n_embed", default=4544)),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5),
        ungated("activation", "gelu"),
        Key("bias", ("attention_bias", "mlp_bias"), False),
        TIED,
    ),
    rules=(_FalconBlocks(),),
    tensors=_table(
        (
            *only(_has_one_norm, *norm("input_layernorm", ATTENTION_NORM)),
            *only(_has_one_norm, *norm("post_attention_layernorm", FEED_FORWARD_NORM)),
            *only(_has_two_norms, *norm("ln_attn", ATTENTION_NORM)),
            *only(_has_two_norms, *norm("ln_mlp", FEED_FORWARD_NORM)),
            *_FUSED_ATTENTION,
            *_MLP,
        )
    ),
    fixed={"apply_residual_connection_post_layernorm": False},
)

ENTRIES = (_BLOOM, _MPT, _FALCON)
