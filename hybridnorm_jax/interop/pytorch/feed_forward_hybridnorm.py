"""The feed-forward branch of a HybridNorm model: dense layers and mixtures of experts."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .configuration_hybridnorm import HIDDEN_NORMS
from .norms_hybridnorm import hidden_norm, times
from .sphere_hybridnorm import StoredScale, wide


def gelu_tanh(x):
    """GELU as a formula of tanh."""
    return F.gelu(x, approximate="tanh")


def gelu_quick(x):
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x):
    """relu(x)^2."""
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_quick": gelu_quick,
    "relu": F.relu,
    "relu_squared": relu_squared,
    "silu": F.silu,
}
# What the gate of a gated layer passes; swiglu_clamped clips both halves besides.
GATES = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "geglu_quick": gelu_quick,
    "reglu": F.relu,
    "reglu_squared": relu_squared,
}


def gated(config):
    """(gate, up) -> what the last projection of a gated layer reads."""
    if config.hidden_act != "swiglu_clamped":
        activation = GATES[config.hidden_act]
        return lambda gate, up: activation(gate) * up
    limit, alpha = config.clamp_limit, config.clamp_alpha

    def clamped(gate, up):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)

    return clamped


class FeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)) where the activation is a gated one, down(activation(up(x))) otherwise.

    Args:
      width: of the hidden layer. size: of x; None: that of the stream.
      has_biases: of all projections; None: as mlp_bias and mlp_output_bias say.
      placement: which norms stand inside; None: none.
    """

    def __init__(self, config, width, size=None, has_biases=None, placement=None):
        super().__init__()
        size = config.hidden_size if size is None else size
        bias = config.mlp_bias if has_biases is None else has_biases
        output_bias = config.has_mlp_output_bias if has_biases is None else has_biases
        self.gate_proj = None
        if config.hidden_act in ACTIVATIONS:
            self.activation = ACTIVATIONS[config.hidden_act]
        else:
            self.gated = gated(config)
            self.gate_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = nn.Linear(width, size, bias=output_bias)
        sphere = getattr(placement, "sphere", False)
        self.factor = size**0.5
        self.up_scale = StoredScale(width) if sphere else nn.Identity()
        self.gate_scale = StoredScale(width) if sphere and self.gate_proj is not None else nn.Identity()
        for name in HIDDEN_NORMS:
            present = getattr(placement, name, False) and (name != "gate_norm" or self.gate_proj is not None)
            setattr(self, name, hidden_norm(config, present, width))

    def forward(self, x):
        up = self.up_norm(self.scaled(self.up_scale, self.up_proj(x)))
        if self.gate_proj is None:
            return self.down_proj(self.hidden_norm(self.activation(up)))
        gate = self.gate_norm(self.scaled(self.gate_scale, self.gate_proj(x)))
        return self.down_proj(self.hidden_norm(self.gated(gate, up)))

    def scaled(self, scale, x):
        """x, or with `sphere` times the root of the width of the stream and the learned numbers."""
        return x if isinstance(scale, nn.Identity) else times(self.factor, scale(x))


class Experts(nn.Module):
    """A token's sum over its chosen experts of weight * down(gated(gate(x), up(x))).

    Parameters: `gate_proj`, `up_proj` (experts, width, hidden) and `down_proj` (experts, hidden, width), which stand
    right of what they are multiplied with; and where these have biases `gate_bias`, `up_bias`, `down_bias` (experts,
    outputs).
    """

    def __init__(self, config):
        super().__init__()
        self.gated = gated(config)
        experts, width, hidden = config.num_experts, config.hidden_size, config.intermediate_size
        for name, inputs, outputs in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            setattr(self, f"{name}_proj", nn.Parameter(torch.zeros(experts, inputs, outputs)))
            has_bias = config.has_mlp_output_bias if name == "down" else config.mlp_bias
            bias = nn.Parameter(torch.zeros(experts, outputs)) if has_bias else None
            setattr(self, f"{name}_bias", bias)

    def forward(self, x, weights, chosen):
        """x (tokens, width), weights and chosen (tokens, k) -> (tokens, width). No token is dropped."""
        experts, k = self.gate_proj.shape[0], chosen.shape[1]
        # One row for each token and expert, those of an expert together.
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).to(torch.int32)
        rows = x[order // k]
        hidden = self.gated(self.product("gate", rows, expert, ends), self.product("up", rows, expert, ends))
        y = wide(self.product("down", hidden, expert, ends)) * weights.flatten()[order, None]
        return y[order.argsort()].unflatten(0, (-1, k)).sum(1).to(x.dtype)

    def product(self, name, rows, expert, ends):
        """Each row times the kernel of its expert, plus the expert's bias."""
        kernels, bias = getattr(self, f"{name}_proj"), getattr(self, f"{name}_bias")
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kernels.dtype
        y = grouped_product(rows.to(dtype), kernels.to(dtype), expert, ends)
        return y if bias is None else y + bias[expert].to(dtype)


def grouped_product(rows, kernels, expert, ends):
    """rows[i] @ kernels[expert[i]] of every row; rows are sorted by expert, and those of expert e end at ends[e]."""
    if rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        # It wants rows of a multiple of 16 bytes, which every model has but those of an odd width.
        inputs, outputs = (-size % 8 for size in kernels.shape[1:])
        y = F.grouped_mm(F.pad(rows, (0, inputs)), F.pad(kernels, (0, outputs, 0, inputs)), offs=ends)
        return y[:, : kernels.shape[2]]
    if not torch.compiler.is_compiling():
        parts = rows.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ kernel for part, kernel in zip(parts, kernels, strict=True)])
    # A graph cannot depend on how many rows an expert has: each computes all rows. Compile in bfloat16 instead.
    y = rows @ kernels[0]
    for number, kernel in enumerate(kernels[1:], 1):
        y = torch.where(expert[:, None] == number, rows @ kernel, y)
    return y


class Router(nn.Linear):
    """A linear layer in float32 at least, also under autocast: rounded logits would choose other experts."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(wide(x), wide(self.weight), None if self.bias is None else wide(self.bias))


class MixtureOfExperts(nn.Module):
    """Every token passes the num_experts_per_tok experts of the largest softmax(router(x)), and the shared experts.

    norm_topk_prob: its weights are divided by their sum. balance_bias: is added for the choice alone.
    shared_expert_gate: what the shared experts give is multiplied by sigmoid(shared_gate(x)), which has a bias with
    shared_expert_gate_bias.
    """

    def __init__(self, config):
        super().__init__()
        self.k, self.normalized = config.num_experts_per_tok, config.norm_topk_prob
        self.router = Router(config.hidden_size, config.num_experts, bias=config.has_router_bias)
        self.experts = Experts(config)
        self.shared = FeedForward(config, config.shared_width) if config.shared_width else None
        has_bias = config.shared_expert_gate_bias
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=has_bias) if config.shared_expert_gate else None
        self.register_buffer("balance_bias", torch.zeros(config.num_experts) if config.balance_bias else None)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        logits = self.router(tokens)
        p = logits.softmax(-1)
        scores = p if self.balance_bias is None else p + self.balance_bias
        chosen = scores.detach().topk(self.k, dim=-1).indices
        weights = logits.gather(-1, chosen).softmax(-1) if self.normalized else p.gather(-1, chosen)
        y = self.experts(tokens, weights, chosen).view_as(x)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)
