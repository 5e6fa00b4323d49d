"""ModelConfig: everything that decides what a Decoder computes."""

import dataclasses
import math
from typing import Any

from hybridnorm_jax.config_fields import Filled, check, check_choice, check_fields, key
from hybridnorm_jax.kernels.backend_names import ATTENTION_BACKENDS, EXPERT_DISPATCHES
from hybridnorm_jax.model.placement import BlockPlacement
from hybridnorm_jax.model.schemes import SCHEMES, Scheme

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu")
NORMS = ("rmsnorm", "layernorm", "crmsnorm")
INITIALIZERS = ("normal", "depth_scaled", "megatron", "deepnorm", "b2t")
# Training takes the policy that fits; by itself a model with "auto" computes nothing again.
AUTO_REMAT = "auto"
REMAT_POLICIES = ("none", "full", "all_but_attention", "dots", "dots_no_batch")
COMPUTE_DTYPES = ("bfloat16", "float32", "float64")
PARAM_DTYPES = ("float32", "float64", "bfloat16", "float16")
# Limits of several keys, and of all together. The largest models that were trained have 10^12 parameters.
WIDEST = 1_048_576
MOST_LAYERS = 10_000
MOST_HEADS = 65_536
MOST_EXPERTS = 65_536
LONGEST_CONTEXT = 16_777_216
MOST_PARAMETERS = 10**14


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder, dense or mixture of experts. Frozen and hashable; wrong values raise ConfigError on construction.

    Fields left at None take the value they stand for, so `dataclasses.replace(config, d_model=...)` keeps the old
    head_dim, mlp_dim and init_std unless these are given too (None again makes them follow).
    """

    scheme: str = key("hybrid_star", "norm placement, a name in hybridnorm_jax.SCHEMES")
    d_model: int = key(768, "width of the residual stream", at_least=1, at_most=WIDEST)
    num_layers: int = key(12, "number of blocks (attention + feed-forward)", at_least=1, at_most=MOST_LAYERS)
    num_heads: int = key(12, "query heads", at_least=1, at_most=MOST_HEADS)
    num_kv_heads: Filled[int] = key(None, "key and value heads; null: num_heads", at_least=1, at_most=MOST_HEADS)
    head_dim: Filled[int] = key(None, "width of one head; null: d_model / num_heads", at_least=1, at_most=WIDEST)
    mlp_dim: Filled[int] = key(
        None,
        "width of the feed-forward layer, or of each expert; null: 4 d_model, or 8/3 d_model for swiglu",
        at_least=1,
        at_most=16 * WIDEST,
    )
    vocab_size: int = key(50304, "rows of the token embedding", at_least=1, at_most=16_777_216)
    activation: str = key("swiglu", f"feed-forward: {' | '.join(ACTIVATIONS)} (gelu is the exact one)")
    num_experts: int = key(
        0,
        "experts of every feed-forward layer, each a swiglu of mlp_dim; 0: a dense layer",
        at_least=0,
        at_most=MOST_EXPERTS,
    )
    experts_per_token: int | None = key(
        None,
        "experts that each token is sent to; none is dropped; needed with num_experts",
        at_least=1,
        at_most=MOST_EXPERTS,
    )
    normalize_expert_weights: bool = key(False, "a token's weights of its experts are divided by their sum")
    shared_experts: int = key(
        0,
        "experts that every token passes besides, as one swiglu of width shared_experts * mlp_dim",
        at_least=0,
        at_most=MOST_EXPERTS,
    )
    balance_bias: bool = key(False, "balance the experts by a bias on their selection; see optimizer.balance_bias_rate")
    norm: str = key("rmsnorm", " | ".join(NORMS))
    attention_norm: str = key(
        "auto", "norm on q, k, v, context: auto (norm; rmsnorm for crmsnorm) | rmsnorm | layernorm"
    )
    norm_eps: float = key(1e-5, "added to the mean square inside the root, in every norm", at_least=0, at_most=1)
    norm_scale: bool = key(True, "norms have a learned scale")
    norm_bias: bool = key(False, "norms have a learned bias")
    norm_width: int | None = key(
        None,
        "crmsnorm: length of the zero-mean vector whose last element is not stored; null: d_model + 1",
        at_least=2,
        at_most=WIDEST + 1,
    )
    attention_norm_scale: Filled[bool] = key(None, "norm_scale of the norms on q, k, v, context; null: norm_scale")
    attention_norm_bias: Filled[bool] = key(None, "norm_bias of the norms on q, k, v, context; null: norm_bias")
    attention_bias: bool = key(False, "q, k, v and output projections have biases")
    mlp_bias: bool = key(False, "feed-forward projections, routers too, have biases")
    head_bias: bool = key(False, "the head has a bias")
    tie_embeddings: bool = key(False, "the head is the transposed token embedding")
    embedding_norm: str = key("auto", "norm after the embedding: auto (as the scheme says) | true | false")
    positions: str = key("rope", "rope | learned")
    rope_theta: float = key(10000.0, "base of the rotary wavelengths", at_least=1, at_most=1e12)
    rotary_fraction: float = key(1.0, "leading fraction of head_dim that rotates", above=0, at_most=1)
    max_positions: int | None = key(
        None, "learned positions there are; null with rope", at_least=1, at_most=LONGEST_CONTEXT
    )
    position_offset: int = key(
        0, "rows of the learned position table before position 0 (OPT has 2)", at_least=0, at_most=LONGEST_CONTEXT
    )
    dropout: float = key(0.0, "drop probability after the embedding and after every branch", at_least=0, below=1)
    initializer: str = key("auto", f"auto (as the scheme says) | {' | '.join(INITIALIZERS)}")
    init_std: Filled[float] = key(
        None, "standard deviation of the initializer; null: 1/sqrt(2.5 d_model)", at_least=1e-30, at_most=1000
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
        check_fields("model", self)
        self._check_names()
        self._fill_derived()
        self._check_size()
        self._check_heads()
        self._check_positions()
        self._check_norm_width()
        self._check_experts()
        self._check_scheme()

    def _check_names(self) -> None:
        check_choice("model.scheme", self.scheme, SCHEMES)
        for name, known in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("attention_norm", ("auto", "rmsnorm", "layernorm")),
            ("attention", ATTENTION_BACKENDS),
            ("expert_dispatch", EXPERT_DISPATCHES),
            ("remat", (*REMAT_POLICIES, AUTO_REMAT)),
            ("dtype", COMPUTE_DTYPES),
            ("param_dtype", PARAM_DTYPES),
            ("initializer", ("auto", *INITIALIZERS)),
            ("embedding_norm", ("auto", "true", "false")),
            ("positions", ("rope", "learned")),
        ):
            check_choice(f"model.{name}", getattr(self, name), known)

    def _fill_derived(self) -> None:
        """Replace null by the value it stands for, so that every reader sees plain numbers."""
        if self.num_kv_heads is None:
            self._fill("num_kv_heads", self.num_heads)
        if self.head_dim is None:
            divisible = self.d_model % self.num_heads == 0
            self._check("num_heads", divisible, f"must divide model.d_model={self.d_model}, or set model.head_dim")
            self._fill("head_dim", self.d_model // self.num_heads)
        if self.mlp_dim is None:
            width = 8 * self.d_model / 3 if self.activation == "swiglu" else 4 * self.d_model
            self._fill("mlp_dim", 16 * math.ceil(width / 16))
        if self.attention_norm_scale is None:
            self._fill("attention_norm_scale", self.norm_scale)
        if self.attention_norm_bias is None:
            self._fill("attention_norm_bias", self.norm_bias)
        if self.init_std is None:
            self._fill("init_std", 1 / math.sqrt(2.5 * self.d_model))

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, is_right: bool, right: str) -> None:
        """Raise ConfigError(`model.name=value: right`) unless this field is right."""
        check(is_right, f"model.{name}", getattr(self, name), right)

    def _check_size(self) -> None:
        """Refuse a model for which no machine has room, before anything is made of its size."""
        attention = 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        kernels = 3 if self.activation == "swiglu" else 2
        feed_forward = kernels * self.d_model * self.mlp_dim * (max(self.num_experts, 1) + self.shared_experts)
        tables = self.d_model * (self.vocab_size * (1 if self.tie_embeddings else 2) + (self.max_positions or 0))
        count = self.num_layers * (attention + feed_forward) + tables
        right = (
            f"makes a model of {count:.1e} parameters; must be at most {MOST_PARAMETERS:.0e}, see its other sizes too"
        )
        self._check("d_model", count <= MOST_PARAMETERS, right)

    def _check_heads(self) -> None:
        divisible = self.num_heads % self.num_kv_heads == 0
        self._check("num_kv_heads", divisible, f"must divide model.num_heads={self.num_heads}")

    def _check_positions(self) -> None:
        if self.positions == "learned":
            self._check("max_positions", self.max_positions is not None, "positions=learned needs a number")
            return
        product = self.rotary_fraction * self.head_dim
        right = (
            f"times model.head_dim={self.head_dim} is {product:.6g}; rope rotates pairs, so it must be an even integer"
        )
        even = self.rotary_dim % 2 == 0 and self.rotary_dim > 0
        self._check("rotary_fraction", even and abs(product - self.rotary_dim) < 1e-6, right)
        self._check("max_positions", self.max_positions is None, "only for positions=learned")
        self._check("position_offset", self.position_offset == 0, "only for positions=learned")

    def _check_norm_width(self) -> None:
        width, stored = self.norm_width, self.d_model
        if width is not None:
            self._check("norm_width", self.norm == "crmsnorm", "only for model.norm=crmsnorm")
            right = f"must be at most model.d_model={stored} and the one element that is not stored"
            self._check("norm_width", width <= stored + 1, right)

    def _check_experts(self) -> None:
        if self.num_experts == 0:
            no_experts = "there are no experts; set model.num_experts"
            self._check("experts_per_token", self.experts_per_token is None, no_experts)
            self._check("normalize_expert_weights", not self.normalize_expert_weights, no_experts)
            self._check("shared_experts", self.shared_experts == 0, no_experts)
            self._check("balance_bias", not self.balance_bias, no_experts)
            return
        chosen = self.experts_per_token
        possible = chosen is not None and chosen <= self.num_experts
        self._check("experts_per_token", possible, f"must be between 1 and model.num_experts={self.num_experts}")
        right = f"experts (model.num_experts={self.num_experts}) are swiglu"
        self._check("activation", self.activation == "swiglu", right)

    def _check_scheme(self) -> None:
        check_choice(f"initializer of model.scheme={self.scheme}", self.initializer_name, INITIALIZERS)
        right = f"model.scheme={self.scheme} starts a norm's scale at another value than 1, so norms need scales"
        self._check("norm_scale", self.norm_scale or not self._starts_a_scale_elsewhere, right)

    @property
    def _starts_a_scale_elsewhere(self) -> bool:
        """Whether the scale of a branch norm starts at another value than 1."""
        sublayers = [sublayer for block in self.placements for sublayer in (block.attention, block.feed_forward)]
        return any(sublayer.branch and sublayer.branch_norm_init != 1.0 for sublayer in sublayers)

    @property
    def attention_norm_kind(self) -> str:
        """The norm on q, k, v and context: a head is no zero-mean vector, so CRMSNorm is not for it."""
        auto = "layernorm" if self.norm == "layernorm" else "rmsnorm"
        return auto if self.attention_norm == "auto" else self.attention_norm

    @property
    def rotary_dim(self) -> int:
        """How many of head_dim's leading channels rotate: the integer that rotary_fraction * head_dim stands for."""
        return round(self.head_dim * self.rotary_fraction)

    @property
    def scheme_rule(self) -> Scheme:
        """The Scheme this model follows."""
        return SCHEMES[self.scheme]

    @property
    def placements(self) -> tuple[BlockPlacement, ...]:
        """The placement of every layer."""
        return self.scheme_rule.placements(self.num_layers)

    @property
    def has_embedding_norm(self) -> bool:
        """Whether a norm follows the embedding."""
        return self.scheme_rule.embedding_norm if self.embedding_norm == "auto" else self.embedding_norm == "true"

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm precedes the head."""
        return self.scheme_rule.final_norm

    @property
    def pre_layernorm_obstacle(self) -> str | None:
        """`key=value` of what keeps this from being a Pre-LN model, to which the equivalences apply; None if it is one.

        Pre-LN: LayerNorm at the entrance of every branch and before the head, and no other norm on the stream.
        """
        scheme = f"model.scheme={self.scheme}"
        if self.norm != "layernorm":
            return f"model.norm={self.norm}"
        if self.has_embedding_norm:
            return f"{scheme}, model.embedding_norm={self.embedding_norm}: a norm after the embedding"
        for layer, placement in enumerate(self.placements):
            for name in ("attention", "feed_forward"):
                sublayer = getattr(placement, name)
                for which in ("post", "branch"):
                    if getattr(sublayer, which):
                        return f"{scheme}: a {which} norm at {name} of layer {layer}"
                if not sublayer.pre:
                    return f"{scheme}: {name} of layer {layer} reads the stream without a norm"
        return None if self.has_final_norm else f"{scheme}: no norm before the head"

    @property
    def initializer_name(self) -> str:
        """The initializer in force."""
        return self.scheme_rule.initializer if self.initializer == "auto" else self.initializer
