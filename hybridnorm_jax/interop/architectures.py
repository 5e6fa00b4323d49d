"""The architectures of transformers: what a config.json of each means as a ModelConfig, and the other way round.

Each architecture has a table of keys: those that become ModelConfig fields, those whose one value is implemented, and
those that do not touch the computation. A key in none of these is an error: it might change the mathematics. An absent
key means the default of the architecture's class in transformers, which leaves defaults out when it writes. What none
of them expresses, our own does (own_architecture.py).
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.hf_config_keys import Architecture, Json, Key, names
from hybridnorm_jax.interop.hf_rope_keys import Rope
from hybridnorm_jax.interop.own_architecture import OWN
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.placement import HEAD_NORMS, BlockPlacement


def mathematics(config: ModelConfig) -> dict[str, Any]:
    """What decides the logits, by ModelConfig key; keys without effect in this model are left out."""
    # In this order messages name what an architecture lacks.
    keys = ["d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "activation"]
    keys += ["norm", "norm_eps", "norm_scale", "norm_bias", "norm_width", "attention_bias", "mlp_bias", "head_bias"]
    keys += ["tie_embeddings", "embedding_scale", "logit_scale", "logit_cap", "layer_scale", "positions"]
    keys += ["rope_theta"] if config.positions == "rope" else ["max_positions", "position_offset"]
    found = {"scheme": (config.placements, config.has_final_norm), "embedding_norm": config.has_embedding_norm}
    found |= _values(config, keys)
    if config.norm_scale or config.attention_norm_scale:
        found["norm_scale_plus_one"] = config.norm_scale_plus_one
    if config.positions == "rope":
        found["rotary_dim"] = None if config.rotary_width == config.head_dim else config.rotary_width
    if any(_has_head_norm(placement) for placement in config.placements):
        found["attention_norm"] = config.attention_norm_kind
        found |= _values(config, ["attention_norm_scale", "attention_norm_bias"])
    found["num_experts"] = config.num_experts
    if config.num_experts:
        keys = ["experts_per_token", "normalize_expert_weights", "shared_experts", "balance_bias"]
        found |= _values(config, keys)
    return found


def _values(config: ModelConfig, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in keys}


def _has_head_norm(placement: BlockPlacement) -> bool:
    return any(getattr(placement, name) is not None for name in HEAD_NORMS)


def architecture_of(document: Any, source: str) -> Architecture:
    """The architecture that a config.json names.

    Raises:
      UserError: it names none, or one that is not supported.
    """
    if not isinstance(document, Mapping):
        raise UserError(f"{source}: must hold a mapping of keys to values")
    name = document.get("model_type")
    if not isinstance(name, str) or name not in ALL:
        raise UserError(f"{source}: model_type={name!r:.80} is not supported; supported: {', '.join(ALL)}")
    return ALL[name]


def config_from_json(document: Any, source: str, ignore_keys: Collection[str] = ()) -> tuple[str, ModelConfig]:
    """The architecture's name and the model of a config.json.

    Args:
      document: what the file holds.
      source: the file, for messages.
      ignore_keys: keys to read as if they were absent.

    Raises:
      UserError: a key or value that is not understood; the message names `source` and the key.
    """
    architecture = architecture_of(document, source)
    if "model_type" in ignore_keys:
        raise UserError(f"{source}: model_type cannot be ignored: it says what all other keys mean")
    kept = {name: value for name, value in document.items() if name not in ignore_keys}
    return architecture.name, architecture.read(kept, source)


def config_to_json(config: ModelConfig, architecture: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of the first architecture, or of the one named, that expresses the model.

    An architecture expresses a model if its config.json read back has the same mathematics. Our own comes last and
    expresses every model.

    Raises:
      UserError: the one that is named does not; the message says what it lacks.
    """
    if architecture is not None and architecture not in ALL:
        raise UserError(f"architecture={architecture} is not supported; supported: {', '.join(ALL)}")
    lost: list[str] = []
    for name in ALL if architecture is None else (architecture,):
        document = ALL[name].write(config)
        lost = _lost(config, ALL[name], document)
        if not lost:
            return name, document
    raise UserError(f"{architecture or OWN.name} cannot express {' or '.join(lost[:3])}")


def _lost(config: ModelConfig, architecture: Architecture, document: Json) -> list[str]:
    """`model.key=value` of everything that this config.json does not say as the config does."""
    try:
        back = mathematics(architecture.read(document, "config.json"))
    except UserError as error:
        # A compressed stream has sizes that no other norm's has, which would be named instead.
        other_norm = config.norm != architecture.constants.get("norm", config.norm)
        return [f"model.norm={config.norm}" if other_norm else f"the model ({error})"]
    ours = mathematics(config)
    # A key with an effect in one of the two only follows from another that differs: the scheme, or the positions.
    lost = [name for name in ours if name in back and ours[name] != back[name]]
    return [f"model.{name}={getattr(config, name)}" for name in lost]


# ---- The tables.

# Far beyond every published model, and few enough to be listed.
MOST_LAYERS = 10_000
# With OPT's two further rows still an int32, which positions are.
MOST_POSITIONS = 2**30

_GELUS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_LAYER_NORM = {"norm": "layernorm", "norm_bias": True}
_RMS_NORM = {"norm": "rmsnorm", "norm_bias": False, "mlp_bias": False, "positions": "rope"}


@dataclasses.dataclass(frozen=True)
class _LlamaDefaults:
    """What absent keys mean in Llama or one of those after it."""

    vocab_size: int
    intermediate_size: int
    eps: float
    hidden_size: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None


def _llama_keys(default: _LlamaDefaults) -> tuple[Key, ...]:
    """The keys that Llama and those after it have in common."""
    return (
        Key("vocab_size", ("vocab_size",), default.vocab_size),
        Key("hidden_size", ("d_model",), default.hidden_size),
        Key("intermediate_size", ("mlp_dim",), default.intermediate_size),
        Key("num_hidden_layers", ("num_layers",), default.layers, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), default.heads),
        Key("num_key_value_heads", ("num_kv_heads",), default.kv_heads, null=_derived),
        Key("hidden_act", ("activation",), "silu", words={"silu": "swiglu", "swish": "swiglu"}),
        Key("rms_norm_eps", ("norm_eps",), default.eps),
        Key("attention_bias", ("attention_bias",), False),
        Key("tie_word_embeddings", ("tie_embeddings",), False),
    )


def _derived(document: Json) -> None:
    """Null leaves it to ModelConfig to derive the value."""


def _four_times_the_width(document: Json) -> int:
    """GPT-2's n_inner where it is null; the width has been checked by then."""
    return 4 * document.get("n_embd", document.get("hidden_size", 768))


_GPT2 = Architecture(
    name="gpt2",
    class_name="GPT2LMHeadModel",
    constants={
        **_LAYER_NORM,
        "scheme": "pre",
        "positions": "learned",
        "attention_bias": True,
        "mlp_bias": True,
    },
    keys=(
        Key("vocab_size", ("vocab_size",), 50257),
        Key("n_embd", ("d_model",), 768, alias="hidden_size"),
        Key("n_layer", ("num_layers",), 12, most=MOST_LAYERS, alias="num_hidden_layers"),
        Key("n_head", ("num_heads",), 12, alias="num_attention_heads"),
        Key("n_inner", ("mlp_dim",), None, null=_four_times_the_width),
        Key("n_positions", ("max_positions",), 1024, most=MOST_POSITIONS, alias="max_position_embeddings"),
        Key("activation_function", ("activation",), "gelu_new", words=_GELUS),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5),
        Key("tie_word_embeddings", ("tie_embeddings",), True),
    ),
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    harmless=names(
        "n_ctx n_special predict_special_tokens output_past attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn "
        "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj"
    ),
)
_GPT_NEOX = Architecture(
    name="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    constants={**_LAYER_NORM, "positions": "rope", "mlp_bias": True},
    keys=(
        Key("vocab_size", ("vocab_size",), 50432),
        Key("hidden_size", ("d_model",), 6144),
        Key("num_hidden_layers", ("num_layers",), 44, most=MOST_LAYERS),
        Key("num_attention_heads", ("num_heads",), 64),
        Key("intermediate_size", ("mlp_dim",), 24576),
        Key("hidden_act", ("activation",), "gelu", words=_GELUS),
        Key("layer_norm_eps", ("norm_eps",), 1e-5),
        Key("attention_bias", ("attention_bias",), True),
        Key("tie_word_embeddings", ("tie_embeddings",), False),
        Key("use_parallel_residual", ("scheme",), True, words={True: "parallel", False: "pre"}),
    ),
    rope=Rope(
        theta="rotary_emb_base",
        fraction="rotary_pct",
        default_fraction=0.25,
        # transformers 4.43 to 4.57 wrote both names; neither reads these two.
        restated={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    ),
)
_OPT = Architecture(
    name="opt",
    class_name="OPTForCausalLM",
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
        Key("activation_function", ("activation",), "relu", words=_GELUS),
        Key("enable_bias", ("attention_bias", "mlp_bias"), True),
        Key("layer_norm_elementwise_affine", ("norm_scale", "norm_bias"), True),
        Key("tie_word_embeddings", ("tie_embeddings",), True),
    ),
    fixed={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": lambda value, document: value in (None, document.get("hidden_size", 768)),
    },
    harmless=names("dropout activation_dropout layerdrop init_std"),
)
_LLAMA = Architecture(
    name="llama",
    class_name="LlamaForCausalLM",
    constants={**_RMS_NORM, "scheme": "pre"},
    keys=(
        *_llama_keys(_LlamaDefaults(vocab_size=32000, intermediate_size=11008, eps=1e-6)),
        Key("head_dim", ("head_dim",), None, null=_derived),
        Key("mlp_bias", ("mlp_bias",), False),
    ),
    rope=Rope(),
    harmless=names("pretraining_tp is_llama_config"),
)
_QWEN3 = Architecture(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    constants={**_RMS_NORM, "scheme": "pre_qk_pre"},
    keys=(
        *_llama_keys(_LlamaDefaults(vocab_size=151936, intermediate_size=22016, eps=1e-6, kv_heads=32)),
        Key("head_dim", ("head_dim",), 128),
    ),
    rope=Rope(),
    # Read where use_sliding_window is true only, which is refused.
    harmless=names("sliding_window max_window_layers"),
)
_OLMO2 = Architecture(
    name="olmo2",
    class_name="Olmo2ForCausalLM",
    constants={**_RMS_NORM, "scheme": "reordered"},
    keys=_llama_keys(_LlamaDefaults(vocab_size=50304, intermediate_size=11008, eps=1e-5)),
    rope=Rope(),
)
_OLMOE = Architecture(
    name="olmoe",
    class_name="OlmoeForCausalLM",
    constants={**_RMS_NORM, "scheme": "pre_qk_projection"},
    keys=(
        *_llama_keys(
            _LlamaDefaults(vocab_size=50304, intermediate_size=2048, eps=1e-5, hidden_size=2048, layers=16, heads=16)
        ),
        Key("num_experts", ("num_experts",), 64, least=1, alias="num_local_experts"),
        Key("num_experts_per_tok", ("experts_per_token",), 8),
        Key("norm_topk_prob", ("normalize_expert_weights",), False),
    ),
    rope=Rope(),
    # The loss in training alone reads them.
    harmless=names("output_router_logits router_aux_loss_coef"),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    entry.name: entry for entry in (_GPT2, _GPT_NEOX, _OPT, _LLAMA, _QWEN3, _OLMO2, _OLMOE)
}
# Those of transformers first: they need no code of ours.
ALL: Mapping[str, Architecture] = {**ARCHITECTURES, OWN.name: OWN}
