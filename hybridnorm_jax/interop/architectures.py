"""What a Hugging Face config.json means as a ModelConfig, and the other way round.

Per architecture a table of keys: those that become ModelConfig fields, those whose one value we implement, and those
that do not touch the computation. A key in none of these is an error: it might change the mathematics. Values of
absent keys are those of the architecture's class in transformers, which leaves such keys out when it writes.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hybridnorm_jax.config import ConfigError, ModelConfig, UserError
from hybridnorm_jax.placement import SCHEMES

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that is one ModelConfig field, or several of one value.

    Attributes:
      name: the key.
      fields: of ModelConfig.
      default: where the key is absent.
      null: where it is null, a function of the document; without one null is an error.
      words: their value -> ours where these differ; the first of several for one of ours is what is written.
    """

    name: str
    fields: tuple[str, ...]
    default: Any
    null: Callable[[Json], Any] | None = None
    words: Mapping[Any, Any] | None = None

    def read(self, document: Json, source: str) -> Any:
        """Our value."""
        value = document.get(self.name, self.default)
        if value is None:
            if self.null is None:
                raise UserError(f"{source}: {self.name}=null, but a value is needed")
            return self.null(document)
        if self.words is not None:
            if not isinstance(value, (str, bool)) or value not in self.words:
                known = ", ".join(map(str, self.words))
                raise UserError(f"{source}: {self.name}={value} is not implemented; implemented: {known}")
            return self.words[value]
        kind = type(self.default) if self.default is not None else int
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{source}: {self.name}={value!r} must be of type {kind.__name__}")
        return kind(value)

    def write(self, config: ModelConfig) -> Any:
        """Their value; one of theirs where none means ours, which the comparison in `express` then finds."""
        value = getattr(config, self.fields[0])
        if self.words is None:
            return value
        return next((theirs for theirs, ours in self.words.items() if ours == value), next(iter(self.words)))


@dataclasses.dataclass(frozen=True)
class Rope:
    """Where config.json states the rotation: under these keys, or in rope_parameters as newer versions write."""

    theta: str = "rope_theta"
    fraction: str | None = None
    default_fraction: float = 1.0

    KEYS = ("rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct", "rope_parameters", "rope_scaling")

    def read(self, document: Json, source: str) -> dict[str, float]:
        """ModelConfig's rope_theta and rotary_fraction."""
        found: dict[str, list[float]] = {"rope_theta": [], "rotary_fraction": []}
        ours = {"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta"}
        ours |= {"partial_rotary_factor": "rotary_fraction", "rotary_pct": "rotary_fraction"}
        nested = {name: document.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
        for place, values in {"": document, **nested}.items():
            if place and not isinstance(values, Mapping):
                raise UserError(f"{source}: {place}={values} must be a mapping")
            for name, value in values.items():
                if name in ours and value is not None:
                    if isinstance(value, bool) or not isinstance(value, (int, float)):
                        raise UserError(f"{source}: {name}={value!r} must be a number")
                    found[ours[name]].append(float(value))
                elif place and value is not None and (name, value) not in (("rope_type", "default"), ("type", "default")):
                    right = "only the plain rotation is implemented"
                    raise UserError(f"{source}: {place}.{name}={value}: {right}")
        for name, values in found.items():
            if len(set(values)) > 1:
                raise UserError(f"{source}: {name} is stated several times, as {' and '.join(map(str, values))}")
        theta = (found["rope_theta"] or [10000.0])[0]
        fraction = (found["rotary_fraction"] or [self.default_fraction])[0]
        if self.fraction is None and fraction != 1:
            raise UserError(f"{source}: partial_rotary_factor={fraction}: this architecture rotates whole heads")
        return {"rope_theta": theta, "rotary_fraction": fraction}

    def write(self, config: ModelConfig) -> dict[str, float]:
        """The older keys, which every version of transformers reads."""
        fraction = {} if self.fraction is None else {self.fraction: config.rotary_fraction}
        return {self.theta: config.rope_theta, **fraction}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How an architecture states a model.

    Attributes:
      name: its model_type.
      class_name: of its language model in transformers.
      constants: ModelConfig fields that are the same in all its models.
      keys: what config.json decides.
      rope: where it states the rotation; None: learned positions.
      fixed: key -> the one value that is implemented, or a function (value, document) -> whether it is.
      harmless: keys of this architecture alone that do not touch the computation.
    """

    name: str
    class_name: str
    constants: Mapping[str, Any]
    keys: tuple[Key, ...]
    rope: Rope | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()

    def read(self, document: Json, source: str) -> ModelConfig:
        """The ModelConfig of a config.json, in float32."""
        self._check(document, source)
        fields = dict(self.constants)
        for key in self.keys:
            fields |= dict.fromkeys(key.fields, key.read(document, source))
        if self.rope is not None:
            fields |= self.rope.read(document, source)
        try:
            return ModelConfig(**fields)
        except ConfigError as error:
            raise UserError(f"{source}: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of a model: its meaning only. What the architecture cannot express is lost."""
        config = _in_schemes(config, self.schemes)
        document = {"model_type": self.name} | {key.name: key.write(config) for key in self.keys}
        return document | ({} if self.rope is None else self.rope.write(config))

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes its models follow."""
        if "scheme" in self.constants:
            return (self.constants["scheme"],)
        return next(tuple(key.words.values()) for key in self.keys if key.fields == ("scheme",))

    def _check(self, document: Json, source: str) -> None:
        fixed = {name: right for name, right in COMMON_FIXED.items() if name not in self.harmless} | dict(self.fixed)
        known = {key.name for key in self.keys} | COMMON_HARMLESS | self.harmless | {"model_type"}
        known |= set(Rope.KEYS) if self.rope is not None else set()
        for name, value in document.items():
            if name in fixed:
                right = fixed[name]
                if not (right(value, document) if callable(right) else value == right):
                    raise UserError(f"{source}: {name}={value} is not implemented for {self.name}")
            elif name not in known:
                raise UserError(
                    f"{source}: {name}={value} is not known for {self.name}; if it does not change what the model "
                    f"computes, pass it in ignore_keys"
                )


def _in_schemes(config: ModelConfig, names: Sequence[str]) -> ModelConfig:
    """The config under whichever of these schemes places the norms as its own does, otherwise as it is."""
    for name in names:
        if SCHEMES[name].placements(config.num_layers) == config.placements:
            return dataclasses.replace(config, scheme=name)
    return config


def mathematics(config: ModelConfig) -> dict[str, Any]:
    """What decides the logits, by ModelConfig key; keys without effect in this model are left out."""
    names = ["d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "activation"]
    names += ["norm", "norm_eps", "norm_scale", "norm_bias", "norm_width", "attention_bias", "mlp_bias", "head_bias"]
    names += ["tie_embeddings", "positions"]
    names += ["rope_theta"] if config.positions == "rope" else ["max_positions", "position_offset"]
    found = {"scheme": (config.placements, config.has_final_norm), "embedding_norm": config.has_embedding_norm}
    found |= {name: getattr(config, name) for name in names}
    if config.positions == "rope":
        found["rotary_fraction"] = config.rotary_dim
    if any((p.q_norm, p.k_norm, p.v_norm, p.context_norm) != (None,) * 4 for p in config.placements):
        found["attention_norm"] = config.attention_norm_kind
        found |= {name: getattr(config, name) for name in ("attention_norm_scale", "attention_norm_bias")}
    return found


def architecture_of(document: Any, source: str) -> Architecture:
    """The architecture that a config.json names."""
    if not isinstance(document, Mapping):
        raise UserError(f"{source}: must hold a mapping of keys to values")
    name = document.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{source}: model_type={name} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def config_from_json(document: Any, source: str, ignore_keys: Collection[str] = ()) -> tuple[str, ModelConfig]:
    """The architecture's name and the model; raises UserError for what is not understood, naming `source` and key."""
    architecture = architecture_of(document, source)
    kept = {name: value for name, value in document.items() if name not in ignore_keys}
    return architecture.name, architecture.read(kept, source)


def config_to_json(config: ModelConfig, architecture: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of the first architecture, or of the one named, that expresses the model.

    An architecture expresses a model if its config.json read back has the same mathematics.

    Raises:
      UserError: none does; the message names the nearest ones and what they lack.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise UserError(f"architecture={architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    lacking: list[tuple[int, str]] = []
    for name in ARCHITECTURES if architecture is None else (architecture,):
        document = ARCHITECTURES[name].write(config)
        lost = _lost(config, ARCHITECTURES[name], document)
        if not lost:
            return name, document
        lacking.append((len(lost), f"{name} cannot express {' or '.join(lost[:3])}"))
    nearest = [reason for _, reason in sorted(lacking)[:2]]
    if architecture is not None:
        raise UserError(nearest[0])
    raise UserError(f"no Hugging Face architecture expresses this model; the nearest: {'; '.join(nearest)}")


def _lost(config: ModelConfig, architecture: Architecture, document: Json) -> list[str]:
    """`model.key=value` of everything that this config.json does not say as the config does."""
    try:
        back = mathematics(architecture.read(document, "config.json"))
    except UserError as error:
        return [f"the model ({error})"]
    ours = mathematics(config)
    lost = [name for name in [*ours, *(name for name in back if name not in ours)] if ours.get(name) != back.get(name)]
    return [f"model.{name}={getattr(config, name)}" for name in lost]


# ---- The tables.

COMMON_HARMLESS = frozenset(
    """
    architectures dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash _from_model_config
    _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled gradient_checkpointing
    use_cache output_hidden_states output_attentions return_dict torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder
    id2label label2id num_labels _num_labels problem_type finetuning_task tokenizer_class task_specific_params prefix
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    initializer_range attention_dropout hidden_dropout classifier_dropout max_position_embeddings max_sequence_length
    transformers.js_config unsloth_fixed unsloth_version
    """.split()
)


def _null_or_false(value: Any, document: Json) -> bool:
    return value is None or value is False


def _none(value: Any, document: Json) -> bool:
    return value is None


def _null_or_empty(value: Any, document: Json) -> bool:
    return value is None or value == {}


def _full_attention(value: Any, document: Json) -> bool:
    return value is None or (isinstance(value, list) and set(map(str, value)) == {"full_attention"})


COMMON_FIXED: Mapping[str, Any] = {
    "is_causal": True,
    "layer_types": _full_attention,
    "pruned_heads": _null_or_empty,
    "per_layer_config": _null_or_empty,
    **dict.fromkeys(
        "is_encoder_decoder add_cross_attention tie_encoder_decoder use_sliding_window use_bidirectional_attention "
        "rope_interleaved use_qk_norm".split(),
        _null_or_false,
    ),
    **dict.fromkeys(
        "sliding_window attention_chunk_size cross_attention_hidden_size clip_qkv attn_logit_softcapping "
        "final_logit_softcapping logit_scale quantization_config compression_config auto_map no_rope_layers".split(),
        _none,
    ),
}

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


def _llama_keys(vocab_size: int, intermediate_size: int, eps: float, *more: Key, kv_heads: int | None = None):
    """The keys that Llama and those after it have in common."""
    return (
        Key("vocab_size", ("vocab_size",), vocab_size),
        Key("hidden_size", ("d_model",), 4096),
        Key("intermediate_size", ("mlp_dim",), intermediate_size),
        Key("num_hidden_layers", ("num_layers",), 32),
        Key("num_attention_heads", ("num_heads",), 32),
        Key("num_key_value_heads", ("num_kv_heads",), kv_heads, null=_none_of),
        Key("hidden_act", ("activation",), "silu", words={"silu": "swiglu", "swish": "swiglu"}),
        Key("rms_norm_eps", ("norm_eps",), eps),
        Key("attention_bias", ("attention_bias",), False),
        Key("tie_word_embeddings", ("tie_embeddings",), False),
        *more,
    )


def _none_of(document: Json) -> None:
    """ModelConfig derives the value."""


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
        Key("n_embd", ("d_model",), 768),
        Key("n_layer", ("num_layers",), 12),
        Key("n_head", ("num_heads",), 12),
        Key("n_inner", ("mlp_dim",), None, null=lambda document: 4 * document.get("n_embd", 768)),
        Key("n_positions", ("max_positions",), 1024),
        Key("activation_function", ("activation",), "gelu_new", words=_GELUS),
        Key("layer_norm_epsilon", ("norm_eps",), 1e-5),
        Key("tie_word_embeddings", ("tie_embeddings",), True),
    ),
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    harmless=frozenset(
        "n_ctx n_special predict_special_tokens output_past attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn "
        "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj".split()
    ),
)
_GPT_NEOX = Architecture(
    name="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    constants={**_LAYER_NORM, "positions": "rope", "mlp_bias": True},
    keys=(
        Key("vocab_size", ("vocab_size",), 50432),
        Key("hidden_size", ("d_model",), 6144),
        Key("num_hidden_layers", ("num_layers",), 44),
        Key("num_attention_heads", ("num_heads",), 64),
        Key("intermediate_size", ("mlp_dim",), 24576),
        Key("hidden_act", ("activation",), "gelu", words=_GELUS),
        Key("layer_norm_eps", ("norm_eps",), 1e-5),
        Key("attention_bias", ("attention_bias",), True),
        Key("tie_word_embeddings", ("tie_embeddings",), False),
        Key("use_parallel_residual", ("scheme",), True, words={True: "parallel", False: "pre"}),
    ),
    rope=Rope(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
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
        Key("num_hidden_layers", ("num_layers",), 12),
        Key("num_attention_heads", ("num_heads",), 12),
        Key("ffn_dim", ("mlp_dim",), 3072),
        Key("max_position_embeddings", ("max_positions",), 2048),
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
    harmless=frozenset("dropout activation_dropout layerdrop init_std".split()),
)
_LLAMA = Architecture(
    name="llama",
    class_name="LlamaForCausalLM",
    constants={**_RMS_NORM, "scheme": "pre"},
    keys=_llama_keys(
        32000,
        11008,
        1e-6,
        Key("head_dim", ("head_dim",), None, null=_none_of),
        Key("mlp_bias", ("mlp_bias",), False),
    ),
    rope=Rope(),
    harmless=frozenset({"pretraining_tp", "is_llama_config"}),
)
_QWEN3 = Architecture(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    constants={**_RMS_NORM, "scheme": "pre_qk_pre"},
    keys=_llama_keys(151936, 22016, 1e-6, Key("head_dim", ("head_dim",), 128), kv_heads=32),
    rope=Rope(),
    # Read where use_sliding_window is true only, which is refused.
    harmless=frozenset({"sliding_window", "max_window_layers"}),
)
_OLMO2 = Architecture(
    name="olmo2",
    class_name="Olmo2ForCausalLM",
    constants={**_RMS_NORM, "scheme": "reordered"},
    keys=_llama_keys(50304, 11008, 1e-5),
    rope=Rope(),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    entry.name: entry for entry in (_GPT2, _GPT_NEOX, _OPT, _LLAMA, _QWEN3, _OLMO2)
}
