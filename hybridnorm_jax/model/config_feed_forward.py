"""The keys of the feed-forward layers and of the experts, which ModelConfig has."""

import dataclasses
import itertools
import math

from hybridnorm_jax.config_fields import check_choice, key
from hybridnorm_jax.model.config_sizes import MOST_EXPERTS, MOST_LAYERS, WIDEST, SizeKeys

# A gated layer is down(activation(gate(x)) * up(x)), any other down(activation(up(x))).
# Of the clamped one up is not what the function is multiplied by, see kernels.swiglu.clamped_swiglu.
CLAMPED = "swiglu_clamped"
GATED = ("swiglu", CLAMPED, "geglu", "geglu_tanh", "geglu_quick", "reglu", "reglu_squared")
PLAIN = ("gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "silu")
ACTIVATIONS = (*GATED, *PLAIN)
EXPERT_ACTIVATIONS = ("swiglu", CLAMPED)


@dataclasses.dataclass(frozen=True)
class FeedForwardKeys(SizeKeys):
    """Feed-forward layers, dense or of experts."""

    activation: str = key(
        "swiglu", f"feed-forward: {' | '.join(ACTIVATIONS)} (gelu is the exact one; those in -glu are gated)"
    )
    clamp_limit: float = key(
        7.0, "swiglu_clamped: the gate is at most this, up lies between -this and this", above=0, at_most=1e6
    )
    clamp_alpha: float = key(
        1.702, "swiglu_clamped: min(g, limit) * sigmoid(alpha * min(g, limit)) * (clip(u) + 1)", above=0, at_most=1e6
    )
    mlp_bias: bool = key(False, "feed-forward projections, routers too, have biases")
    mlp_output_bias: bool | None = key(None, "the last feed-forward projection has a bias; null: mlp_bias")
    layer_scale: bool = key(False, "what each branch adds is multiplied by a learned scale per channel (LayerScale)")
    num_experts: int = key(
        0,
        "experts of every feed-forward layer, each a gated layer of mlp_dim; 0: a dense layer",
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
        "experts that every token passes besides, as one gated layer of width shared_mlp_dim",
        at_least=0,
        at_most=MOST_EXPERTS,
    )
    shared_mlp_dim: int | None = key(
        None, "width of the shared experts together; null: shared_experts * mlp_dim", at_least=1, at_most=16 * WIDEST
    )
    shared_expert_gate: bool = key(False, "what the shared experts give is multiplied by sigmoid(x @ kernel)")
    shared_expert_gate_bias: bool = key(False, "the gate of the shared experts is sigmoid(x @ kernel + bias)")
    router_bias: bool | None = key(None, "the router has a bias; null: mlp_bias")
    balance_bias: bool = key(False, "balance the experts by a bias on their selection; see optimizer.balance_bias_rate")
    dense_layers: tuple[int, ...] = key(
        (), "with num_experts: layers, from 0, whose feed-forward layer is dense", at_least=0, at_most=MOST_LAYERS
    )
    dense_mlp_dim: int | None = key(
        None, "width of the layers of dense_layers; null: mlp_dim", at_least=1, at_most=16 * WIDEST
    )

    @property
    def is_gated(self) -> bool:
        """Whether feed-forward layers have a gate."""
        return self.activation in GATED

    @property
    def has_experts(self) -> tuple[bool, ...]:
        """Of each layer, whether its feed-forward layer is one of experts."""
        return tuple(self.num_experts > 0 and layer not in self.dense_layers for layer in range(self.num_layers))

    @property
    def has_mlp_output_bias(self) -> bool:
        """Whether the last projection of feed-forward layers has a bias."""
        return self.mlp_bias if self.mlp_output_bias is None else self.mlp_output_bias

    @property
    def has_router_bias(self) -> bool:
        """Whether routers have a bias."""
        return self.mlp_bias if self.router_bias is None else self.router_bias

    @property
    def shared_width(self) -> int:
        """The width of the shared experts together; 0: there are none."""
        return self.shared_experts * self.mlp_dim if self.shared_mlp_dim is None else self.shared_mlp_dim

    @property
    def dense_width(self) -> int:
        """The width of feed-forward layers that have no experts."""
        return self.mlp_dim if self.dense_mlp_dim is None else self.dense_mlp_dim

    def _fill_feed_forward(self) -> None:
        check_choice("model.activation", self.activation, ACTIVATIONS)
        if self.mlp_dim is None:
            width = 8 * self.d_model / 3 if self.is_gated else 4 * self.d_model
            self._fill("mlp_dim", 16 * math.ceil(width / 16))

    def _check_experts(self) -> None:
        if self.num_experts == 0:
            no_experts = "there are no experts; set model.num_experts"
            self._check("experts_per_token", self.experts_per_token is None, no_experts)
            for name in ("normalize_expert_weights", "shared_experts", "router_bias", "balance_bias", "dense_layers"):
                self._check(name, not getattr(self, name), no_experts)
        else:
            chosen = self.experts_per_token
            possible = chosen is not None and chosen <= self.num_experts
            self._check("experts_per_token", possible, f"must be between 1 and model.num_experts={self.num_experts}")
            right = f"experts (model.num_experts={self.num_experts}) are {' or '.join(EXPERT_ACTIVATIONS)}"
            self._check("activation", self.activation in EXPERT_ACTIVATIONS, right)
        self._check_clamp()
        self._check_dense_layers()
        self._check_shared_experts()

    def _check_clamp(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in ("clamp_limit", "clamp_alpha"):
                as_by_default = getattr(self, field.name) == field.default
                is_clamped = self.activation == CLAMPED
                self._check(field.name, is_clamped or as_by_default, "only for model.activation=swiglu_clamped")

    def _check_dense_layers(self) -> None:
        listed = self.dense_layers
        ordered = all(before < after for before, after in itertools.pairwise(listed))
        self._check("dense_layers", ordered, "must be layers in rising order, each once")
        right = f"must be layers from 0 to {self.num_layers - 1}, and not all of them"
        some = len(listed) < self.num_layers and all(layer < self.num_layers for layer in listed)
        self._check("dense_layers", not listed or some, right)
        right = "only for the layers of model.dense_layers, and there are none"
        self._check("dense_mlp_dim", bool(listed) or self.dense_mlp_dim is None, right)

    def _check_shared_experts(self) -> None:
        if self.shared_experts == 0:
            right = "there are no shared experts; set model.shared_experts"
            self._check("shared_mlp_dim", self.shared_mlp_dim is None, right)
            self._check("shared_expert_gate", not self.shared_expert_gate, right)
        right = "the shared experts have no gate; set model.shared_expert_gate"
        self._check("shared_expert_gate_bias", self.shared_expert_gate or not self.shared_expert_gate_bias, right)
