"""ModelConfig: everything that decides what a Decoder computes.

Its keys stand by topic: sizes in config_sizes.py, feed-forward layers and experts in config_feed_forward.py, attention
and positions in config_attention.py, norms in config_norms.py, all others here.
"""

import dataclasses
import math
from typing import Any, Self

from hybridnorm_jax.config_fields import Filled, check_choice, check_fields, key
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.backend_names import ATTENTION_BACKENDS, EXPERT_DISPATCHES
from hybridnorm_jax.model.config_norms import NormKeys
from hybridnorm_jax.model.config_sizes import MOST_LAYERS, MOST_PARAMETERS, WIDEST
from hybridnorm_jax.model.placement import (
    BlockPlacement,
    LearnedScale,
    SublayerPlacement,
)
from hybridnorm_jax.model.ramps import DEFAULT_RAMP_STEPS
from hybridnorm_jax.model.runs import Layer, Run, runs
from hybridnorm_jax.model.schemes import SCHEMES

INITIALIZERS = ("normal", "depth_scaled", "megatron", "deepnorm", "sub_ln", "b2t", "simple_gpt", "ngpt")
# What null means for init_std where the authors of the initializer state a number: here SimpleNorm (2602.01212).
STATED_STD = {"simple_gpt": 0.02}
# Training takes the policy that fits; by itself a model with "auto" computes nothing again.
AUTO_REMAT = "auto"
REMAT_POLICIES = ("none", "full", "all_but_attention", "dots", "dots_no_batch")
COMPUTE_DTYPES = ("bfloat16", "float32", "float64")
PARAM_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig(NormKeys):
    """A decoder, dense or mixture of experts. Frozen and hashable; wrong values raise ConfigError on construction.

    Fields left at None take the value they stand for, so `dataclasses.replace(config, d_model=...)` keeps the old
    head_dim, mlp_dim and init_std unless these are given too (None again makes them follow).
    """

    embedding_scale: float | None = key(
        None, "factor of the token embedding, before positions are added; null: 1", above=0, at_most=1e6
    )
    branch_multiplier: float = key(
        1.0, "factor of what every branch adds, besides the branch_scale of the scheme (Granite)", above=0, at_most=1e6
    )
    ramp_steps: int | None = key(
        None,
        "where branches grow with the training step (prores_*, branch_norm): the number of updates after which all are "
        f"whole; null: {DEFAULT_RAMP_STEPS}",
        at_least=1,
        at_most=10**9,
    )
    ramp_at: int | None = key(
        None,
        "where branches grow with the training step: they stay as they are after so many updates; null: they grow",
        at_least=0,
        at_most=10**9,
    )
    tie_embeddings: bool = key(False, "the head is the transposed token embedding")
    head_bias: bool = key(False, "the head has a bias")
    logit_scale: float | None = key(
        None, "factor of the logits; null: 1, or base_width/d_model where both are tied", above=0, at_most=1e6
    )
    logit_cap: float | None = key(None, "logits z become cap * tanh(z / cap); null: no cap", above=0, at_most=1e6)
    dropout: float = key(0.0, "drop probability after the embedding and after every branch", at_least=0, below=1)
    initializer: str = key("auto", f"auto (as the scheme says) | {' | '.join(INITIALIZERS)}")
    init_std: Filled[float] = key(
        None,
        "standard deviation of the initializer; null: 0.02 with simple_gpt, whose embedding and head have their own, "
        "and 1/sqrt(2.5 d_model) with the others; with base_width it is that of a model of this width",
        at_least=1e-30,
        at_most=1000,
    )
    base_width: int | None = key(
        None,
        "muP: the width at which initial values and learning rates are as they are stated, and from which they follow "
        "for d_model (docs/widths.md); null: rates do not depend on d_model",
        at_least=1,
        at_most=WIDEST,
    )
    dtype: str = key("float32", f"compute dtype: {' | '.join(COMPUTE_DTYPES)}")
    param_dtype: str = key("float32", f"dtype of the parameters: {' | '.join(PARAM_DTYPES)}; training needs 32 bits")
    attention: str = key("auto", f"backend: {' | '.join(ATTENTION_BACKENDS)}")
    expert_dispatch: str = key("auto", f"what computes the experts: {' | '.join(EXPERT_DISPATCHES)}")
    remat: str = key("none", f"what the backward pass recomputes: {' | '.join((*REMAT_POLICIES, AUTO_REMAT))}")
    scan_unroll: int = key(
        1,
        "blocks per iteration of the scan over layers; more is faster and compiles longer",
        at_least=1,
        at_most=MOST_LAYERS,
    )

    def __post_init__(self) -> None:
        # YAML and the command line give true/false; the field holds one of three words.
        object.__setattr__(self, "embedding_norm", str(self.embedding_norm).lower())
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):  # as JSON gives it, but it is to be hashable
                self._fill(field.name, tuple(getattr(self, field.name)))
        check_fields("model", self)
        self._check_names()
        self._fill_sizes()
        self._fill_feed_forward()
        self._fill_derived()
        self._check_size()
        self._check_heads()
        self._check_positions()
        self._check_norms()
        self._check_norm_starts()
        self._check_experts()
        self._check_scheme()
        self._check_ramps()
        self._check_width()

    def _check_names(self) -> None:
        check_choice("model.scheme", self.scheme, SCHEMES)
        self._check_names_of_norms()
        for name, known in (
            ("attention", ATTENTION_BACKENDS),
            ("expert_dispatch", EXPERT_DISPATCHES),
            ("remat", (*REMAT_POLICIES, AUTO_REMAT)),
            ("dtype", COMPUTE_DTYPES),
            ("param_dtype", PARAM_DTYPES),
            ("initializer", ("auto", *INITIALIZERS)),
        ):
            check_choice(f"model.{name}", getattr(self, name), known)

    def _fill_derived(self) -> None:
        """Replace null by the value it stands for, so that every reader sees plain numbers."""
        self._fill_norms()
        if self.init_std is None:
            width = self.d_model if self.base_width is None else self.base_width
            self._fill("init_std", STATED_STD.get(self.initializer_name, 1 / math.sqrt(2.5 * width)))

        if self.logit_scale is None and self.base_width is not None and self.tie_embeddings:
            self._fill("logit_scale", 1 / self.width_ratio)
        if self.attention_scale is None and self.base_head_dim is not None:
            self._fill("attention_scale", self._scale_of_grown_heads(self.base_head_dim))

    def _check_size(self) -> None:
        """Refuse a model for which no machine has room, before anything is made of its size."""
        attention = 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        kernels = 3 if self.is_gated else 2
        widths = self.mlp_dim * max(self.num_experts, 1) + self.shared_width
        feed_forward = kernels * self.d_model * max(widths, self.dense_width)
        tables = self.whole_width * (self.vocab_size * (1 if self.tie_embeddings else 2) + (self.max_positions or 0))
        count = self.num_layers * (attention + feed_forward) + tables
        right = (
            f"makes a model of {count:.1e} parameters; must be at most {MOST_PARAMETERS:.0e}, see its other sizes too"
        )
        self._check("d_model", count <= MOST_PARAMETERS, right)

    def _check_ramps(self) -> None:
        growing = [placement for placement in self.scheme_rule.placements(self.num_layers) if placement.grows]
        for name in ("ramp_steps", "ramp_at"):
            right = f"no branch of model.scheme={self.scheme} grows with the training step"
            self._check(name, bool(growing) or getattr(self, name) is None, right)
        right = f"must be at least model.num_layers={self.num_layers}, because deeper layers grow for longer"
        self._check("ramp_steps", not growing or self.ramp_length >= self.num_layers, right)

    def _check_width(self) -> None:
        """What model.base_width and model.base_head_dim can be combined with."""
        if self.base_head_dim is not None:
            follows = self._scale_of_grown_heads(self.base_head_dim)
            right = f"model.base_head_dim={self.base_head_dim} makes it {follows:g}; leave one of the two out"
            self._check("attention_scale", self.attention_scale == follows, right)
        if self.base_width is None:
            return
        if self.tie_embeddings:
            follows = 1 / self.width_ratio
            right = f"model.base_width={self.base_width} and a tied head make it {follows:g}; leave it out"
            self._check("logit_scale", self.logit_scale == follows, right)
        obstacle = self._obstacle_to_widths
        self._check("base_width", obstacle is None, f"not with {obstacle}")

    def _scale_of_grown_heads(self, base: int) -> float:
        """sqrt(base) / head_dim, written so that it is 1 / sqrt(head_dim), bit for bit, where head_dim is the base."""
        return math.sqrt(base / self.head_dim) / math.sqrt(self.head_dim)

    @property
    def _obstacle_to_widths(self) -> str | None:
        """`key=value` for which the rules of width_scaling.py do not hold, and why; None: they do."""
        if self.scheme_rule.sphere:
            return f"model.scheme={self.scheme}, which keeps matrices at unit length and has rates of its own"
        if self.norm_kind.has_wide_matrices:
            return f"model.norm={self.norm}, whose norms have matrices, for which no rule is stated"
        return None

    def _check_scheme(self) -> None:
        check_choice(f"initializer of model.scheme={self.scheme}", self.initializer_name, INITIALIZERS)
        right = f"model.scheme={self.scheme} starts a norm's scale at another value than 1, so norms need scales"
        self._check("norm_scale", self.norm_scale or not self._starts_a_scale_elsewhere, right)
        right = f"model.scheme={self.scheme} has a learned scale behind its branches already"
        has_own = any(sublayer.layer_scale is not None for sublayer in self._sublayers)
        self._check("layer_scale", not (self.layer_scale and has_own), right)
        normalized = [placement.normalizes_hidden or placement.sphere for placement in self.placements]
        right = f"model.scheme={self.scheme} has norms or scales inside feed-forward layers, which experts cannot have"
        blocks = zip(normalized, self.has_experts, strict=True)
        self._check("num_experts", not any(is_normalized and experts for is_normalized, experts in blocks), right)
        right = f"must divide model.d_model={self.d_model}: model.scheme={self.scheme} has a scale for each part of it"
        after = any(placement.head_scales == "after" for placement in self.placements)
        self._check("num_heads", not after or self.d_model % self.num_heads == 0, right)

    @property
    def _sublayers(self) -> list[SublayerPlacement]:
        return [sublayer for block in self.placements for sublayer in (block.attention, block.feed_forward)]

    def layer_scale_of(self, sublayer: SublayerPlacement) -> LearnedScale:
        """The learned scale behind a branch of this placement: its own, or that of model.layer_scale."""
        return "channel" if self.layer_scale else sublayer.layer_scale

    @property
    def _starts_a_scale_elsewhere(self) -> bool:
        """Whether the scale of a norm starts at another value than 1."""
        return any(sublayer.pre_norm_init != 1.0 or sublayer.branch_norm_init != 1.0 for sublayer in self._sublayers)

    @property
    def placements(self) -> tuple[BlockPlacement, ...]:
        """The placement of every layer, with model.branch_multiplier and the shares of model.ramp_at in its scales."""
        return self.scheme_rule.placements(
            self.num_layers,
            branch_multiplier=self.branch_multiplier,
            ramp_steps=self.ramp_steps,
            ramp_at=self.ramp_at,
        )

    @property
    def ramp_length(self) -> int:
        """The number of updates after which all branches are whole, where they grow."""
        return DEFAULT_RAMP_STEPS if self.ramp_steps is None else self.ramp_steps

    @property
    def grows(self) -> bool:
        """Whether a branch grows with the training step, which the model then needs to be told."""
        return any(placement.grows for placement in self.placements)

    def at_step(self, step: int) -> Self:
        """This configuration as it is after so many updates; itself, where nothing grows with the training step."""
        return dataclasses.replace(self, ramp_at=min(step, self.ramp_length)) if self.grows else self

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What every layer is."""
        return tuple(
            Layer(placement=placement, has_experts=has_experts, window=window, rotation=rotation)
            for placement, has_experts, window, rotation in zip(
                self.placements, self.has_experts, self.layer_windows, self.layer_rotations, strict=True
            )
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """The layers in groups of one structure each, which share a loop."""
        return runs(self.layers)

    @property
    def more_than_head_table(self) -> str | None:
        """`key=value` of what gives the head parameters besides its table; None where it has no others."""
        if self.scheme_rule.sphere:
            return f"model.scheme={self.scheme}"
        return "model.head_bias=true" if self.head_bias else None

    @property
    def pre_layernorm_obstacle(self) -> str | None:
        """`key=value` of what keeps this from being a Pre-LN model, to which the equivalences apply; None if it is one.

        Pre-LN: LayerNorm at the entrance of every branch and before the head, and no other norm on the stream. A norm
        after the embedding stands before the stream: it becomes part of the table, or its mean is subtracted behind it.
        """
        if self.grows:
            return f"model.scheme={self.scheme}, whose branches grow with the training step (model.ramp_at=null)"
        found = [] if self.norm_kind.is_layer_norm else [f"model.norm={self.norm}"]
        if self.learned_embedding_scale:
            found.append("model.learned_embedding_scale=true")
        if misplaced := self._misplaced_norm:
            found.append(misplaced)
        return ", and ".join(found) or None

    @property
    def _misplaced_norm(self) -> str | None:
        """`key=value` and the first place of a norm that Pre-LN does not have there, or lacks; None: there is none."""
        scheme = f"model.scheme={self.scheme}"
        if self.side_stream is not None:
            return f"{scheme}: a second stream"
        for layer, placement in enumerate(self.placements):
            for name in ("attention", "feed_forward"):
                sublayer = getattr(placement, name)
                for which in ("post", "branch"):
                    if getattr(sublayer, which):
                        return f"{scheme}: a {which} norm at {name} of layer {layer}"
                if sublayer.entry:
                    return f"{scheme}: an entry norm at {name} of layer {layer}"
                if sublayer.residual_vector:
                    return f"{scheme}: a learned residual vector at {name} of layer {layer}"
                if sublayer.layer_scale is not None:
                    return f"{scheme}: a learned scale behind {name} of layer {layer}"
                if not sublayer.pre:
                    return f"{scheme}: {name} of layer {layer} reads the stream without a norm"
            if placement.head_scales == "after":
                return f"{scheme}: scales of heads behind the output projection of layer {layer}"
        return None if self.has_final_norm else f"{scheme}: no norm before the head"

    def with_scheme(self, scheme: str, **keys: Any) -> Self:
        """This model with another scheme, and with these keys; init_std follows it unless it was set."""
        unset: dict[str, Any] = {"init_std": None}
        follows = self.init_std == dataclasses.replace(self, **unset).init_std
        return dataclasses.replace(self, **{"scheme": scheme, **(unset if follows else {}), **keys})

    @property
    def width_ratio(self) -> float:
        """m of width_scaling.py: how many times as wide as model.base_width the model is; 1 without one."""
        width = self.d_model if self.norm_width is None else self.norm_width
        return 1.0 if self.base_width is None else width / self.base_width

    @property
    def stated_width(self) -> int:
        """The width by which the embedding's scale and the ends of simple_gpt start."""
        return self.whole_width if self.base_width is None else self.base_width

    @property
    def initializer_name(self) -> str:
        """The initializer in force."""
        return self.scheme_rule.initializer if self.initializer == "auto" else self.initializer


def check_is_config(config: object) -> None:
    """Raise ConfigError for what is no ModelConfig; an EncoderConfig is one."""
    if not isinstance(config, ModelConfig):
        right = "give a ModelConfig or an EncoderConfig; that of a run is its `model`"
        raise ConfigError(f"config: is of the type {type(config).__name__}; {right}")
