"""What config.json of our own PyTorch code means as a ModelConfig, and the other way round.

The code is in pytorch/; it expresses every model of ours. Its config.json says of each layer where it normalizes, so
the code needs no table of schemes. Here it is read as data: no code beside it is executed. Encoders have further keys,
which own_encoder.py has.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.interop.hf_architecture import Architecture
from hybridnorm_jax.interop.hf_config_keys import MOST_LAYERS, Json, Key, names, none
from hybridnorm_jax.interop.tensor_parts import EXPORTED_NORMS, HYBRIDNORM
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.config_attention import POSITIONS, ROPE_SCALINGS, TABLES
from hybridnorm_jax.model.config_feed_forward import ACTIVATIONS
from hybridnorm_jax.model.norm_kinds import NORM_KINDS
from hybridnorm_jax.model.placement import BlockPlacement, SublayerPlacement
from hybridnorm_jax.model.schemes import SCHEMES

# The files of pytorch/ that are copied beside the weights of a decoder.
CODE_FILES = (
    "attention_hybridnorm.py",
    "block_hybridnorm.py",
    "configuration_hybridnorm.py",
    "feed_forward_hybridnorm.py",
    "modeling_hybridnorm.py",
    "norms_hybridnorm.py",
    "positions_hybridnorm.py",
    "sphere_hybridnorm.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_hybridnorm.HybridNormConfig",
    "AutoModel": "modeling_hybridnorm.HybridNormModel",
    "AutoModelForCausalLM": "modeling_hybridnorm.HybridNormForCausalLM",
}
# Fields of ModelConfig that no key of config.json holds, and why. All others are in KEYS or read by `read`, below.
NOT_WRITTEN = {
    "initializer": "how fresh weights are drawn",
    "base_width": "how fresh weights are drawn, and with which rates they are trained",
    "base_head_dim": "attention_scale, which follows from it, is written",
    "norm_alpha": "what fresh norms start at",
    "norm_shift": "what fresh norms start at",
    "param_dtype": "torch_dtype says it",
    "dtype": "the dtype that a caller computes in",
    "attention": "what computes attention, not which",
    "expert_dispatch": "what computes the experts, not which",
    "remat": "what the backward pass computes again",
    "scan_unroll": "how the program is compiled",
}
# Fields that `read` and `write` join to keys of another meaning.
READ_APART = ("scheme", "embedding_norm", "rotary_dim", "max_positions")
_PRE = {"attention": {"pre": True}, "feed_forward": {"pre": True}}
_DEFAULT_LAYERS = 12


def _same(*words: str) -> Mapping[str, str]:
    return {word: word for word in words}


@dataclasses.dataclass(frozen=True)
class _Numbers(Key):
    """A key whose value is a list of numbers of one type."""

    def read(self, document: Json, source: str) -> tuple[Any, ...]:
        """Our value."""
        value = document.get(self.name, [])
        if not isinstance(value, list):
            raise UserError(f"{source}: {self.name}={value!r:.80} must be a list of numbers")
        return tuple(self._checked_number(f"{self.name}[{place}]", each, source) for place, each in enumerate(value))

    def write(self, config: ModelConfig) -> list[Any]:
        """Their value: ours as a list."""
        return list(getattr(config, self.fields[0]))


def _float_or_null(name: str, field: str) -> Key:
    return Key(name, (field,), None, null=none, kind=float, most=10**12)


def _bool_or_null(name: str, field: str) -> Key:
    return Key(name, (field,), None, null=none, kind=bool)


# The defaults are those of HybridNormConfig: transformers leaves out what is as it is by default.
KEYS = (
    Key("vocab_size", ("vocab_size",), 50304),
    Key("hidden_size", ("d_model",), 768),
    Key("num_hidden_layers", ("num_layers",), _DEFAULT_LAYERS, most=MOST_LAYERS),
    Key("num_attention_heads", ("num_heads",), 12),
    Key("num_key_value_heads", ("num_kv_heads",), 12),
    Key("head_dim", ("head_dim",), 64),
    Key("intermediate_size", ("mlp_dim",), 2048),
    Key("hidden_act", ("activation",), "swiglu", words=_same(*ACTIVATIONS)),
    Key("norm", ("norm",), "rmsnorm", words=_same(*EXPORTED_NORMS)),
    Key("norm_eps", ("norm_eps",), 1e-5),
    Key("norm_scale", ("norm_scale",), True),
    Key("norm_bias", ("norm_bias",), False),
    Key("norm_width", ("norm_width",), None, null=none),
    Key("norm_scale_plus_one", ("norm_scale_plus_one",), False),
    Key("attention_norm_scale", ("attention_norm_scale",), True),
    Key("attention_norm_bias", ("attention_norm_bias",), False),
    Key("attention_norm_per_head", ("attention_norm_per_head",), False),
    _bool_or_null("outer_norm_scale", "outer_norm_scale"),
    _bool_or_null("outer_norm_bias", "outer_norm_bias"),
    Key("whole_outside", ("whole_outside",), False),
    Key("embedding_centring", ("embedding_centring",), False),
    Key("layer_scale", ("layer_scale",), False),
    Key("positions", ("positions",), "rope", words=_same(*POSITIONS)),
    Key("rotary_base", ("rope_theta",), 10000.0, most=10**12),
    _Numbers("rotary_layers", ("rope_layers",), None),
    _float_or_null("second_rotary_base", "second_rope_theta"),
    Key("rotary_scaling", ("rope_scaling",), "none", words=_same(*ROPE_SCALINGS)),
    Key("rotary_factor", ("rope_factor",), 1.0),
    Key("rotary_original_length", ("rope_original_length",), None, null=none),
    _Numbers("rotary_bounds", ("rope_bounds",), None, kind=float),
    _float_or_null("rotary_attention_factor", "rope_attention_factor"),
    Key("rotary_truncate", ("rope_truncate",), True),
    _Numbers("rotary_short_factors", ("rope_short_factors",), None, kind=float),
    _Numbers("rotary_long_factors", ("rope_long_factors",), None, kind=float),
    Key("position_offset", ("position_offset",), 0),
    Key("alibi_max", ("alibi_max",), 8.0),
    Key("alibi_scale", ("alibi_scale",), 1.0),
    Key("alibi_bfloat16", ("alibi_bfloat16",), False),
    _Numbers("attention_windows", ("windows",), None),
    _float_or_null("attention_scale", "attention_scale"),
    _float_or_null("score_cap", "score_cap"),
    _float_or_null("qkv_clip", "qkv_clip"),
    Key("attention_sinks", ("attention_sinks",), False),
    Key("num_experts", ("num_experts",), 0),
    Key("num_experts_per_tok", ("experts_per_token",), None, null=none),
    Key("norm_topk_prob", ("normalize_expert_weights",), False),
    Key("num_shared_experts", ("shared_experts",), 0),
    Key("shared_intermediate_size", ("shared_mlp_dim",), None, null=none),
    Key("shared_expert_gate", ("shared_expert_gate",), False),
    Key("shared_expert_gate_bias", ("shared_expert_gate_bias",), False),
    Key("balance_bias", ("balance_bias",), False),
    _Numbers("dense_layers", ("dense_layers",), None),
    Key("dense_intermediate_size", ("dense_mlp_dim",), None, null=none),
    Key("clamp_limit", ("clamp_limit",), 7.0),
    Key("clamp_alpha", ("clamp_alpha",), 1.702),
    Key("attention_bias", ("attention_bias",), False),
    _bool_or_null("attention_output_bias", "attention_output_bias"),
    Key("mlp_bias", ("mlp_bias",), False),
    _bool_or_null("mlp_output_bias", "mlp_output_bias"),
    _bool_or_null("router_bias", "router_bias"),
    Key("head_bias", ("head_bias",), False),
    _float_or_null("embedding_scale", "embedding_scale"),
    Key("learned_embedding_scale", ("learned_embedding_scale",), False),
    # These are in the placements, too; PyTorch takes them from there.
    Key("branch_multiplier", ("branch_multiplier",), 1.0),
    Key("ramp_steps", ("ramp_steps",), None, null=none),
    Key("ramp_at", ("ramp_at",), None, null=none),
    _float_or_null("logits_scale", "logit_scale"),
    _float_or_null("logits_cap", "logit_cap"),
    Key("tie_word_embeddings", ("tie_embeddings",), False),
    Key("dropout", ("dropout",), 0.0),
    Key("initializer_range", ("init_std",), 0.02),
)
# Keys of meanings that no single field has.
_OF_HEADS = [name for name in EXPORTED_NORMS if NORM_KINDS[name].for_heads]
ATTENTION_NORM = Key("attention_norm", ("attention_norm",), "rmsnorm", words=_same(*_OF_HEADS))
ROTARY_DIM = Key("rotary_dim", (), 64)
MOST_POSITIONS = Key("max_position_embeddings", ("max_positions",), None, null=none)
EMBEDDING_NORM = Key("embedding_norm", (), False)
FINAL_NORM = Key("final_norm", (), True)
SPHERE = Key("sphere", (), False)
KEYS_READ_APART = (ATTENTION_NORM, ROTARY_DIM, MOST_POSITIONS, EMBEDDING_NORM, FINAL_NORM, SPHERE)


@dataclasses.dataclass(frozen=True)
class OwnArchitecture(Architecture):
    """How config.json of our own code states a model.

    Attributes:
      auto_map: which class of our code each of transformers' Auto classes loads.
    """

    auto_map: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def schemes(self) -> tuple[str, ...]:
        """Every scheme."""
        return tuple(SCHEMES)

    def read(self, document: Json, source: str) -> ModelConfig:
        """The ModelConfig of a config.json, in float32."""
        self._check(document, source)
        fields = dict(self.constants)
        fields |= {field: key.read(document, source) for key in self._plain_keys for field in key.fields}
        fields["attention_norm"] = ATTENTION_NORM.read(document, source)
        fields["embedding_norm"] = str(EMBEDDING_NORM.read(document, source)).lower()
        if fields["positions"] in TABLES:
            fields["max_positions"] = MOST_POSITIONS.read(document, source)
        elif fields["positions"] == "rope":
            fields["rotary_dim"] = ROTARY_DIM.read(document, source)
        fields["scheme"] = _scheme(document, source, fields)
        for rule in self.rules:
            fields |= rule.read(document, source, fields)
        try:
            return self.config_class(**fields)
        except ConfigError as error:
            raise UserError(f"{source}: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of a model: its meaning only."""
        _check_exported(config)
        document = {"model_type": self.name, "auto_map": self.auto_map}
        document |= {key.name: key.write(config) for key in self._plain_keys}
        if config.side_stream is not None:
            document["side_stream"] = dataclasses.asdict(config.side_stream)
        for rule in self.rules:
            document |= rule.write(config)
        if config.has_position_table:
            document[MOST_POSITIONS.name] = config.max_positions
        elif config.positions == "rope":
            document[ROTARY_DIM.name] = config.rotary_width
        return document | {
            ATTENTION_NORM.name: config.attention_norm_kind,
            EMBEDDING_NORM.name: config.has_embedding_norm,
            FINAL_NORM.name: config.has_final_norm,
            SPHERE.name: config.scheme_rule.sphere,
            "scheme": config.scheme,
            "placements": [placement_to_json(placement) for placement in config.placements],
        }

    @property
    def _plain_keys(self) -> list[Key]:
        """Those that are one field each."""
        return [key for key in self.keys if key not in KEYS_READ_APART]


OWN = OwnArchitecture(
    name="hybridnorm",
    class_name="HybridNormForCausalLM",
    family="hybridnorm",
    constants={},
    keys=(*KEYS, *KEYS_READ_APART),
    tensors=HYBRIDNORM,
    fixed={"auto_map": lambda value, document: True},  # which classes transformers should load; we load none
    harmless=names("scheme placements side_stream"),
    code_files=CODE_FILES,
    auto_map=AUTO_MAP,
)


def _check_exported(config: ModelConfig) -> None:
    """Raise UserError for norms, and for scales, that the PyTorch code does not have."""
    if config.grows:
        right = "say at which, with config.at_step(step) or model.ramp_at"
        raise UserError(f"model.scheme={config.scheme}: its branches grow with the training step; {right}")
    for name, kind in (("norm", config.norm), ("attention_norm", config.attention_norm_kind)):
        if kind not in EXPORTED_NORMS:
            known = ", ".join(EXPORTED_NORMS)
            right = "a kind of a plugin's, which the PyTorch code beside exported weights does not have"
            raise UserError(f"model.{name}={kind}: {right}; it has {known}")


# ---- Placements as data.


def placement_to_json(placement: BlockPlacement) -> dict[str, Any]:
    """What is in a placement, by its name; what is absent, or a scale of 1, is left out."""
    stated: dict[str, Any] = {}
    for field in dataclasses.fields(placement):
        value = getattr(placement, field.name)
        if isinstance(value, SublayerPlacement):
            stated[field.name] = _stated_parts(value)
        elif value != field.default:
            stated[field.name] = value
    return stated


def _stated_parts(sublayer: SublayerPlacement) -> dict[str, Any]:
    parts = {field.name: (getattr(sublayer, field.name), field.default) for field in dataclasses.fields(sublayer)}
    return {name: value for name, (value, default) in parts.items() if value != default}


def placement_from_json(stated: Any, where: str) -> BlockPlacement:
    """The placement that a mapping states; `where` is the key, for messages."""
    parts = dict(_mapping(stated, where, [field.name for field in dataclasses.fields(BlockPlacement)]))
    known = [field.name for field in dataclasses.fields(SublayerPlacement)]
    try:
        for name in ("attention", "feed_forward"):
            parts[name] = SublayerPlacement(**_mapping(parts.get(name, {}), f"{where}.{name}", known))
        return BlockPlacement(**parts)
    except UserError:  # which is a ValueError
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _mapping(value: Any, where: str, known: tuple[str, ...] | list[str]) -> Mapping[str, Any]:
    """The value, which must be a mapping with these keys alone."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}={value!r:.80}: must be a mapping")
    for key in value:
        if key not in known:
            raise UserError(f"{where}.{shortened(key)}: not known; known: {', '.join(known)}")
    return value


def _scheme(document: Json, source: str, fields: Mapping[str, Any]) -> str:
    """The scheme of the table that has the placements and the final norm of this config.json.

    Args:
      fields: of ModelConfig, as far as they are read.

    Raises:
      UserError: none has, as with a plugin that was not imported. A run that trains on needs the name of a scheme.
    """
    stated = document.get("placements", [_PRE] * _DEFAULT_LAYERS)
    if not isinstance(stated, list):
        raise UserError(f"{source}: placements: must be a list, with a placement for each layer")
    num_layers = fields["num_layers"]
    if len(stated) != num_layers:
        raise UserError(f"{source}: placements: {len(stated)} of them, but num_hidden_layers={num_layers}")
    placements = tuple(placement_from_json(each, f"{source}: placements[{layer}]") for layer, each in enumerate(stated))
    name = document.get("scheme")
    stated_ends = FINAL_NORM.read(document, source), document.get("side_stream"), SPHERE.read(document, source)
    numbers = {key: fields[key] for key in ("branch_multiplier", "ramp_steps", "ramp_at")}
    for scheme in sorted(SCHEMES, key=lambda scheme: scheme != name):  # its own name first
        rule = SCHEMES[scheme]
        its_own = rule.placements(num_layers, **numbers)
        side_stream = None if rule.side_stream is None else dataclasses.asdict(rule.side_stream)
        if (rule.final_norm, side_stream, rule.sphere) == stated_ends and its_own == placements:
            return scheme
    if isinstance(name, str) and name in SCHEMES:
        raise UserError(f"{source}: placements and final_norm are not those of scheme={name}, nor of any other scheme")
    right = "no scheme here has its placements; import the plugin that has it first (run.plugins=[...])"
    raise UserError(f"{source}: scheme={name!r:.80}: {right}")
