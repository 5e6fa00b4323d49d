"""How keys of a Hugging Face config.json are read into a ModelConfig and written from one.

The architectures, which are made of these, stand in architectures/.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from hybridnorm_jax.config_fields import shortened
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.interop.tensor_places import TensorTable
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.schemes import SCHEMES

Json = Mapping[str, Any]
# Far beyond every published model, and few enough to be listed.
MOST_LAYERS = 10_000
# With two further rows still an int32, which positions are.
MOST_POSITIONS = 2**30


def names(text: str) -> frozenset[str]:
    """The keys that a text lists, with spaces between them."""
    return frozenset(text.split())


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that is one ModelConfig field, or several of one value.

    Attributes:
      name: the key.
      fields: of ModelConfig.
      default: where the key is absent.
      null: where it is null, a function of the document; without one null is an error.
      words: their value -> ours where these differ. Of several that mean one of ours the default is written, or the
        first.
      least: their smallest number. Without one ModelConfig decides.
      most: their largest number. A few bytes of config.json must not make anybody build a list of so many layers.
      alias: another name that the architecture's class reads as this one; it is never written.
      kind: type of the value where the default is null.
      written: attribute of ModelConfig that is written; by default the first of the fields.
    """

    name: str
    fields: tuple[str, ...]
    default: Any
    null: Callable[[Json], Any] | None = None
    words: Mapping[Any, Any] | None = None
    least: int | None = None
    most: int = 2**31 - 1
    alias: str | None = None
    kind: type = int
    written: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those by which a config.json may state it."""
        return (self.name,) if self.alias is None else (self.name, self.alias)

    def read(self, document: Json, source: str) -> Any:
        """Our value."""
        name = self._stated_name(document, source)
        value = document.get(name, self.default)
        if value is None:
            if self.null is None:
                raise UserError(f"{source}: {name}=null, but a value is needed")
            return self.null(document)
        if self.words is not None:
            if not isinstance(value, (str, bool)) or value not in self.words:
                known = ", ".join(map(str, self.words))
                raise UserError(f"{source}: {name}={value!r:.80} is not implemented; implemented: {known}")
            return self.words[value]
        return self._checked_number(name, value, source)

    def _stated_name(self, document: Json, source: str) -> str:
        """The name by which the document states the key; the first one where it does not."""
        if self.alias is None or self.alias not in document:
            return self.name
        if self.name not in document:
            return self.alias
        value, other = document[self.name], document[self.alias]
        if other != value:
            right = f"but {self.alias}, another name of it, is {other!r:.80}"
            raise UserError(f"{source}: {self.name}={value!r:.80}, {right}")
        return self.name

    def _checked_number(self, name: str, value: Any, source: str) -> Any:
        """A value of the default's type, or of `kind` where the default is null; a truth value is one of these, too."""
        kind = type(self.default) if self.default is not None else self.kind
        fitting = (int, float) if kind is float else kind
        # For Python True is an int.
        is_truth, wants_truth = isinstance(value, bool), kind is bool
        if is_truth != wants_truth or not isinstance(value, fitting):
            raise UserError(f"{source}: {name}={value!r:.80} must be of type {kind.__name__}")
        if kind in (int, float) and not -(2**31) < value <= self.most:  # NaN and Infinity, too
            raise UserError(f"{source}: {name}={value!r:.80} is out of range")
        if self.least is not None and value < self.least:
            raise UserError(f"{source}: {name}={value}: must be at least {self.least}")
        return kind(value)

    def write(self, config: ModelConfig) -> Any:
        """Their value; some value of theirs where none means ours, which config_to_json then finds by comparing."""
        value = getattr(config, self.written or self.fields[0])
        if self.words is not None:
            theirs = [word for word, meaning in self.words.items() if meaning == value]
            if self.default in theirs:
                return self.default
            return theirs[0] if theirs else next(iter(self.words))
        if self.least is not None:
            return self.default if value < self.least else value
        return self.default if value is None and self.null is None else value


@dataclasses.dataclass(frozen=True)
class Multiplier(Key):
    """A key whose value is a factor, which is null with us where it is 1."""

    def read(self, document: Json, source: str) -> Any:
        """Our value."""
        value = super().read(document, source)
        return None if value == 1 else value

    def write(self, config: ModelConfig) -> Any:
        """Their value."""
        value = super().write(config) if getattr(config, self.fields[0]) is not None else None
        return 1.0 if value is None else value


@dataclasses.dataclass(frozen=True)
class Inverse(Key):
    """A key whose value is one over ours."""

    power = -1.0

    def read(self, document: Json, source: str) -> Any:
        """Our value; null where it is 1."""
        value = super().read(document, source)
        if value <= 0:
            raise UserError(f"{source}: {self.name}={value} must be above 0")
        return None if self.written is None and value == 1 else value**self.power

    def write(self, config: ModelConfig) -> Any:
        """Their value: the one that is read as ours, where there is one."""
        value = getattr(config, self.written or self.fields[0])
        if value is None:
            return 1.0
        near = value ** (1 / self.power)
        if isinstance(self.default, int):
            return round(near)
        candidates = (float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
        return next((each for each in candidates if each > 0 and each**self.power == value), near)


@dataclasses.dataclass(frozen=True)
class InverseRoot(Inverse):
    """A key whose value is one over the square of ours."""

    power = -0.5


class Rule(Protocol):
    """Keys of config.json that together decide fields of ModelConfig."""

    @property
    def names(self) -> Collection[str]:
        """Every key that a config.json may hold for it."""

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the keys decide.

        Args:
          document: what config.json holds.
          source: the file, for messages.
          fields: those that are decided already.

        Raises:
          UserError: a value that is none, or means what no model here computes.
        """

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; values that are read back as another model where none means this one."""


@dataclasses.dataclass(frozen=True)
class RootOfWidth:
    """The embedding is multiplied by the root of its width: always, or where a key says so.

    Attributes:
      key: the key, true by default.
    """

    key: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The key."""
        return () if self.key is None else (self.key,)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.embedding_scale."""
        if self.key is not None and not Key(self.key, (), True).read(document, source):
            return {}
        return {"embedding_scale": float(fields["d_model"]) ** 0.5}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The key."""
        return {} if self.key is None else {self.key: config.embedding_scale == float(config.d_model) ** 0.5}


@dataclasses.dataclass(frozen=True)
class TimesTheWidth:
    """Feed-forward layers are so many times as wide as the stream; no key says so."""

    factor: int

    @property
    def names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.mlp_dim."""
        return {"mlp_dim": self.factor * fields["d_model"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclasses.dataclass(frozen=True)
class Choice:
    """True and false of several keys together choose fields, the scheme among them.

    Attributes:
      defaults: the keys, and what they mean where they are absent.
      fields: the keys' values, in this order -> the fields.
    """

    defaults: Mapping[str, bool]
    fields: Mapping[tuple[bool, ...], Mapping[str, Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The keys."""
        return tuple(self.defaults)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes among which they choose."""
        return tuple(dict.fromkeys(fields["scheme"] for fields in self.fields.values()))

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields."""
        values = tuple(Key(name, (), default).read(document, source) for name, default in self.defaults.items())
        return dict(self.fields[values])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; the defaults where they do not mean its scheme."""
        for values, fields in self.fields.items():
            if fields["scheme"] == config.scheme:
                return dict(zip(self.defaults, values, strict=True))
        return dict(self.defaults)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How an architecture states a model.

    Attributes:
      name: its model_type.
      class_name: of its language model in transformers.
      constants: ModelConfig fields that are the same in all its models.
      keys: what config.json decides, key by key.
      tensors: where its tensors hold our leaves.
      rules: what several keys decide together.
      fixed: key -> the one value that is implemented, or a function (value, document) -> whether it is.
      harmless: keys of this architecture alone that do not touch the computation.
      summary: what is particular about it, for the table of the documentation.
      config_class: ModelConfig, or EncoderConfig for an encoder.
      classes: further classes whose checkpoints are read, where these are not the model without its head.
    """

    name: str
    class_name: str
    constants: Mapping[str, Any]
    keys: tuple[Key, ...]
    tensors: TensorTable
    rules: tuple[Rule, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: Collection[str] = ()
    summary: str = ""
    config_class: type[ModelConfig] = ModelConfig
    classes: tuple[str, ...] = ()

    def read(self, document: Json, source: str) -> ModelConfig:
        """The ModelConfig of a config.json, in float32."""
        self._check(document, source)
        fields = dict(self.constants)
        for key in self.keys:
            fields |= dict.fromkeys(key.fields, key.read(document, source))
        for rule in self.rules:
            fields |= rule.read(document, source, fields)
        try:
            return self.config_class(**fields)
        except ConfigError as error:
            raise UserError(f"{source}: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json of a model: its meaning only. What the architecture cannot express is lost."""
        config = _in_schemes(config, self.schemes)
        document = {"model_type": self.name} | {key.name: key.write(config) for key in self.keys}
        for rule in self.rules:
            document |= rule.write(config)
        return document

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes its models follow."""
        if "scheme" in self.constants:
            return (self.constants["scheme"],)
        return tuple(scheme for part in (*self.keys, *self.rules) for scheme in _schemes_of(part))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes whose checkpoints hold these tensors: the language model, and the model without its head."""
        bare = self.class_name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return (self.class_name, *self.classes, *([] if bare == self.class_name else [f"{bare}Model"]))

    @property
    def _own_names(self) -> set[str]:
        """The keys that keys and rules read."""
        return {name for part in (*self.keys, *self.rules) for name in part.names}

    @property
    def _known(self) -> set[str]:
        """Every key that config.json may hold, but those of one value."""
        return {"model_type"} | self._own_names | COMMON_HARMLESS | set(self.harmless)

    def _check(self, document: Json, source: str) -> None:
        """Raise UserError for a key that is not known, or has a value that is not implemented."""
        own = self._own_names | set(self.harmless)
        fixed = {name: right for name, right in COMMON_FIXED.items() if name not in own} | dict(self.fixed)
        known = self._known
        for name, value in document.items():
            if name in fixed:
                right = fixed[name]
                if not (right(value, document) if callable(right) else value == right):
                    raise UserError(f"{source}: {name}={value!r:.80} is not implemented for {self.name}")
            elif name not in known:
                ignored = shortened(name)
                right = (
                    f"might change what the model computes; if it does not, load with ignore_keys=[{ignored!r}], or "
                    f"convert with --ignore-key {ignored}"
                )
                raise UserError(f"{source}: {ignored}={value!r:.80} is not known for {self.name} and {right}")


def _schemes_of(part: Any) -> Iterator[str]:
    """The schemes among which a key or a rule chooses."""
    if isinstance(part, Key) and part.fields == ("scheme",):
        yield from (part.words or {}).values()
    yield from getattr(part, "schemes", ())


def head_dim_of(fields: Mapping[str, Any]) -> int | None:
    """The width of a head; None where ModelConfig will refuse the sizes."""
    if fields.get("head_dim") is not None:
        return int(fields["head_dim"])
    width, heads = fields["d_model"], fields["num_heads"]
    return width // heads if heads > 0 and width % heads == 0 else None


def _in_schemes(config: ModelConfig, names: Sequence[str]) -> ModelConfig:
    """The config under whichever of these schemes places the norms as its own does, otherwise as it is."""
    own = config.scheme_rule.placements(config.num_layers)
    for name in names:
        if SCHEMES[name].placements(config.num_layers) == own:
            return dataclasses.replace(config, scheme=name)
    return config


# ---- Keys that any config.json may hold.

# Bookkeeping, token ids, generation, outputs, training.
COMMON_HARMLESS = names(
    """
    architectures transformers_version _name_or_path name_or_path _commit_hash _from_model_config
    _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled gradient_checkpointing
    use_cache output_hidden_states output_attentions return_dict torchscript use_bfloat16 tf_legacy_loss
    tie_last_hidden_states chunk_size_feed_forward is_decoder
    id2label label2id num_labels _num_labels problem_type finetuning_task tokenizer_class task_specific_params prefix
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    initializer_range attention_dropout hidden_dropout classifier_dropout max_position_embeddings max_sequence_length
    transformers.js_config unsloth_fixed unsloth_version
    """
)


# ---- Tests of a value, as Architecture.fixed takes them.


def _null_or_false(value: Any, document: Json) -> bool:
    return value is None or value is False


def _none(value: Any, document: Json) -> bool:
    return value is None


def _null_or_empty(value: Any, document: Json) -> bool:
    return value is None or value == {}


def _dtype(value: Any, document: Json) -> bool:
    """The parameters are read as they are stored, so any dtype that they may have is as good as none."""
    return value is None or value in ("float64", "float32", "bfloat16", "float16")


def _full_attention(value: Any, document: Json) -> bool:
    return value is None or (isinstance(value, list) and set(map(str, value)) == {"full_attention"})


COMMON_FIXED: Mapping[str, Any] = {
    "is_causal": True,
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "layer_types": _full_attention,
    "pruned_heads": _null_or_empty,
    "per_layer_config": _null_or_empty,
    **dict.fromkeys(
        names(
            "is_encoder_decoder add_cross_attention tie_encoder_decoder use_sliding_window use_bidirectional_attention "
            "rope_interleaved use_qk_norm"
        ),
        _null_or_false,
    ),
    **dict.fromkeys(
        names(
            "sliding_window attention_chunk_size cross_attention_hidden_size clip_qkv attn_logit_softcapping "
            "final_logit_softcapping logit_scale quantization_config compression_config auto_map no_rope_layers"
        ),
        _none,
    ),
}
