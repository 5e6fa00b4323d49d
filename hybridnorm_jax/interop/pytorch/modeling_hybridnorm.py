"""Decoders whose norms stand where their configuration says, in PyTorch for transformers 5.

Every sublayer, attention or feed-forward, of every placement is `apply_formula`, below. A placement is data: of each
layer config.json says which norms and scales of the formula are there.

The names of the linear layers, for LoRA and the like: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj,
router. The weights of experts are parameters of `Experts` with a leading axis.

Attention is torch's scaled_dot_product_attention, whatever the device. Statistics of norms, the rotation, the router
and the scales of the formula are computed in float32 at least. No buffer is computed in a constructor.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_hybridnorm import HEAD_NORMS, SUBLAYER, HybridNormConfig

# transformers renamed it in 5.x. Both names are taken; this is the one that outputs have.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def placement_of(config, layer):
    """The placement of a layer, with every part that config.json leaves out: norms, "input", scales of 1."""
    stated = config.placements[layer]
    absent = {part: 1.0 if known is None else known[0] for part, known in SUBLAYER.items()}
    sublayers = {name: SimpleNamespace(**(absent | stated.get(name, {}))) for name in ("attention", "feed_forward")}
    return SimpleNamespace(**sublayers, **{name: stated.get(name) for name in HEAD_NORMS})


# ---- The formula and its norms.


def apply_formula(f, sublayer_input, block_input, placement, norms):
    """y = post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x)))): every sublayer of every scheme."""
    pre, branch, post = norms
    x = block_input if placement.reads == "block" else sublayer_input
    r = {"input": sublayer_input, "block": block_input}.get(placement.residual)
    r = sublayer_input + block_input if placement.residual == "both" else r
    y = branch(f(times(placement.input_scale, pre(x))))
    return post(times(placement.residual_scale, r) + times(placement.branch_scale, y))


def times(scale, x):
    """scale * x, multiplied in float32 at least and rounded once."""
    return x if scale == 1 else (scale * wide(x)).to(x.dtype)


def wide(x):
    """x in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.Module):
    """One of three norms over the last axis, in float32 at least; eps stands inside the root.

    rmsnorm:   x / sqrt(mean(x^2) + eps)
    layernorm: (x - mean) / sqrt(variance + eps)
    crmsnorm:  x / sqrt((sum x^2 + (sum x)^2) / width + eps), for a zero-mean vector of length `width` whose last
               element is not stored

    times `weight`, plus `bias`, where there are these.
    """

    def __init__(self, kind, size, *, eps, scale, bias, width=None, initial_scale=1.0):
        super().__init__()
        self.kind, self.eps, self.width, self.initial_scale = kind, eps, width or size + 1, initial_scale
        self.weight = nn.Parameter(torch.full((size,), initial_scale)) if scale else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x):
        y = wide(x)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdim=True)
            y = y - y.mean(-1, keepdim=True)
        if self.kind == "crmsnorm":
            square = (y.square().sum(-1, keepdim=True) + y.sum(-1, keepdim=True).square()) / self.width
        else:
            square = y.square().mean(-1, keepdim=True)
        y = y * torch.rsqrt(square + self.eps)
        if self.weight is not None:
            y = y * self.weight.to(y.dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


def stream_norm(config, present=True, initial_scale=1.0):
    """A norm on the residual stream; the identity where it is not present."""
    if not present:
        return nn.Identity()
    affine = {"scale": config.norm_scale, "bias": config.norm_bias, "initial_scale": initial_scale}
    return Norm(config.norm, config.hidden_size, eps=config.norm_eps, width=config.norm_width, **affine)


# ---- Attention.


def rotation(config, position_ids, dtype):
    """cos and sin (batch, 1, tokens, rotary_dim / 2) of position / base^(2i / rotary_dim), in float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, config.rotary_dim, 2, device=position_ids.device, dtype=dtype)
    angles = position_ids[:, None, :, None].to(dtype) / config.rotary_base ** (even / config.rotary_dim)
    return angles.cos(), angles.sin()


def rotate(x, by):
    """RoPE on the leading channels of each head, channel i paired with i + half; the others pass unchanged."""
    cos, sin = by
    half = cos.shape[-1]
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], dim=-1)


def causal_mask(attention_mask, queries, past, slots, device):
    """Which keys each query sees, (batch, 1, queries, keys), True where it does; None: itself and all before it.

    Every query sees its own key, that of padding too: a row that sees nothing would be NaN.

    Args:
      attention_mask: (batch, tokens so far), 0 at padding; or a mask of four axes, which is taken as it is; or None.
      past: how many tokens were before the first query.
      slots: of a cache that has them all from the beginning; None: there are as many keys as tokens.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    keys = past + queries if slots is None else slots
    if slots is None and attention_mask is not None and attention_mask.shape[1] != keys:
        raise ValueError(f"attention_mask is of {attention_mask.shape[1]} tokens, but there are {keys} so far")
    # A look at a mask's values would break a graph.
    if attention_mask is not None and queries > 1 and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    if attention_mask is None and slots is None and queries in (1, keys):
        return None
    own = torch.arange(queries, device=device)[:, None] + past
    key = torch.arange(keys, device=device)
    seen = key <= own
    if attention_mask is None:
        return seen[None, None]
    is_token = F.pad(attention_mask.to(device, torch.bool), (0, keys - attention_mask.shape[1]))
    return ((seen & is_token[:, None]) | (key == own))[:, None]


def positions_of(attention_mask, queries, past, device):
    """0, 1, ... of the tokens of each row; padding does not count."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -queries:]
    return (torch.arange(queries, device=device) + past)[None]


class Attention(nn.Module):
    """softmax(N(q) N(k)^T / sqrt(head_dim) + mask) N(v), normalized, times W_O. Norms stand before the rotation."""

    def __init__(self, config, layer, placement):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.extents = {name: getattr(placement, name) for name in HEAD_NORMS}
        width, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, heads, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, width, bias=bias)
        for name, size in zip(HEAD_NORMS, (heads, kv_heads, kv_heads, heads), strict=True):
            if self.extents[name] is not None:
                size = self.head_dim if self.extents[name] == "head" else size
                affine = {"scale": config.attention_norm_scale, "bias": config.attention_norm_bias}
                setattr(self, name, Norm(config.attention_norm, size, eps=config.norm_eps, **affine))

    def forward(self, x, by, mask, cache, place):
        """What attention adds to the stream (batch, tokens, width).

        Args:
          by: of `rotation`. mask: of `causal_mask`. place: the numbers of these tokens in the cache.
        """
        q = self.heads("q_norm", self.q_proj(x)).transpose(1, 2)
        k = self.heads("k_norm", self.k_proj(x)).transpose(1, 2)
        v = self.heads("v_norm", self.v_proj(x)).transpose(1, 2)
        if by is not None:
            q, k = rotate(q, by), rotate(k, by)
        if cache is not None:
            k, v = cache.update(k, v, self.layer, {"cache_position": place})
        if self.groups > 1 and mask is not None:  # with a mask torch has no fast kernel for shared heads
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        # In this order the value is a bool also where the length is a symbol of torch.compile.
        kind = {"is_causal": q.shape[2] > 1 and mask is None, "enable_gqa": self.groups > 1 and mask is None}
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kind)
        return self.o_proj(self.heads("context_norm", context.transpose(1, 2).flatten(2)).flatten(2))

    def heads(self, name, x):
        """x (batch, tokens, heads * head_dim) as (batch, tokens, heads, head_dim), normalized where the norm exists."""
        if self.extents[name] == "projection":
            x = getattr(self, name)(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return getattr(self, name)(x) if self.extents[name] == "head" else x


# ---- Feed-forward layers.

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) for swiglu, down(activation(up(x))) otherwise."""

    def __init__(self, config, width):
        super().__init__()
        self.activation = config.hidden_act
        if self.activation == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        if self.activation == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class Experts(nn.Module):
    """A token's sum over its chosen experts of weight * down(silu(gate(x)) * up(x)).

    Parameters: `gate_proj`, `up_proj` (experts, width, hidden) and `down_proj` (experts, hidden, width), which stand
    right of what they are multiplied with; and `gate_bias`, `up_bias`, `down_bias` (experts, outputs) with mlp_bias.
    """

    def __init__(self, config):
        super().__init__()
        experts, width, hidden = config.num_experts, config.hidden_size, config.intermediate_size
        for name, inputs, outputs in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            setattr(self, f"{name}_proj", nn.Parameter(torch.zeros(experts, inputs, outputs)))
            bias = nn.Parameter(torch.zeros(experts, outputs)) if config.mlp_bias else None
            setattr(self, f"{name}_bias", bias)

    def forward(self, x, weights, chosen):
        """x (tokens, width), weights and chosen (tokens, k) -> (tokens, width). No token is dropped."""
        experts, k = self.gate_proj.shape[0], chosen.shape[1]
        # One row for each token and expert, those of an expert together.
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True).to(torch.int32)
        rows = x[order // k]
        hidden = F.silu(self.product("gate", rows, expert, ends)) * self.product("up", rows, expert, ends)
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
    """

    def __init__(self, config):
        super().__init__()
        self.k, self.normalized = config.num_experts_per_tok, config.norm_topk_prob
        self.router = Router(config.hidden_size, config.num_experts, bias=config.mlp_bias)
        self.experts = Experts(config)
        shared = config.num_shared_experts
        self.shared = FeedForward(config, shared * config.intermediate_size) if shared else None
        self.register_buffer("balance_bias", torch.zeros(config.num_experts) if config.balance_bias else None)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        logits = self.router(tokens)
        p = logits.softmax(-1)
        scores = p if self.balance_bias is None else p + self.balance_bias
        chosen = scores.detach().topk(self.k, dim=-1).indices
        weights = logits.gather(-1, chosen).softmax(-1) if self.normalized else p.gather(-1, chosen)
        y = self.experts(tokens, weights, chosen).view_as(x)
        return y if self.shared is None else y + self.shared(x)


# ---- The model.


class HybridNormBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each by the formula."""

    def __init__(self, config, layer):
        super().__init__()
        self.placement = placement_of(config, layer)
        self.self_attn = Attention(config, layer, self.placement)
        self.mlp = MixtureOfExperts(config) if config.num_experts else FeedForward(config, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)
        for name in ("attention", "feed_forward"):
            parts = getattr(self.placement, name)
            setattr(self, f"{name}_pre_norm", stream_norm(config, parts.pre))
            setattr(self, f"{name}_branch_norm", stream_norm(config, parts.branch, parts.branch_norm_init))
            setattr(self, f"{name}_post_norm", stream_norm(config, parts.post))

    def forward(self, x, by=None, mask=None, cache=None, place=None):
        """The stream (batch, tokens, width) after this block."""

        def attend(x):
            return self.dropout(self.self_attn(x, by, mask, cache, place))

        def feed_forward(x):
            return self.dropout(self.mlp(x))

        y = apply_formula(attend, x, x, self.placement.attention, self.norms("attention"))
        return apply_formula(feed_forward, y, x, self.placement.feed_forward, self.norms("feed_forward"))

    def norms(self, name):
        return [getattr(self, f"{name}_{which}_norm") for which in ("pre", "branch", "post")]


class HybridNormPreTrainedModel(PreTrainedModel):
    config_class = HybridNormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridNormBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Weights that are in no checkpoint: N(0, initializer_range^2), scales as the placement says, biases 0."""
        std = self.config.initializer_range
        if isinstance(module, Norm) and module.weight is not None:
            nn.init.constant_(module.weight, module.initial_scale)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            for kernel in (module.gate_proj, module.up_proj, module.down_proj):
                nn.init.normal_(kernel, std=std)
        for name in ("bias", "gate_bias", "up_bias", "down_bias", "balance_bias"):
            if getattr(module, name, None) is not None:
                nn.init.zeros_(getattr(module, name))


class HybridNormModel(HybridNormPreTrainedModel):
    """Everything but the head."""

    def __init__(self, config):
        super().__init__(config)
        config.check()
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.position_offset + config.max_position_embeddings, width)
        self.embedding_norm = stream_norm(config, config.embedding_norm)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([HybridNormBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = stream_norm(config, config.final_norm)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        past_key_values=None,
        **kwargs,
    ):
        """What the head reads, (batch, tokens, width).

        Args:
          attention_mask: 0 at padding, of all tokens so far. Padding may stand on either side.
          position_ids: counted without padding where they are not given.
          cache: keys and values of the tokens before these; past_key_values is its older name.
          kwargs: what transformers hands to every model and this one has no use for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        keeps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if self.gradient_checkpointing and self.training:
            cache, use_cache = None, False  # computing a layer again would write its keys twice
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        queries, past = x.shape[1], 0 if cache is None else cache.get_seq_length()
        slots = cache.layers[0].max_cache_len if cache is not None and cache.is_compileable else None
        if position_ids is None:
            position_ids = positions_of(attention_mask, queries, past, x.device)
        mask = causal_mask(attention_mask, queries, past, slots, x.device)
        by = rotation(self.config, position_ids, x.dtype) if self.config.positions == "rope" else None
        x = x + self.learned_positions(position_ids) if by is None else x
        x = self.dropout(self.embedding_norm(x))
        place = None if cache is None else torch.arange(queries, device=x.device) + past
        streams = ()
        for block in self.layers:
            streams += (x,) if keeps else ()  # kept without need, they would fill the memory
            x = block(x, by=by, mask=mask, cache=cache, place=place)
        x = self.norm(x)
        streams = (*streams, x) if keeps else None
        kept = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=streams, **kept)

    def learned_positions(self, position_ids):
        count = self.config.max_position_embeddings
        is_hidden = torch.compiler.is_compiling() or position_ids.is_meta  # a look at values would break a graph
        last = position_ids.shape[-1] - 1 if is_hidden else int(position_ids.max())
        if last >= count:
            raise ValueError(f"position {last}, counted from 0, but max_position_embeddings={count}")
        return self.embed_positions(position_ids + self.config.position_offset)


class HybridNormForCausalLM(HybridNormPreTrainedModel, GenerationMixin):
    """The model with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = HybridNormModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        past_key_values=None,
        **kwargs,
    ):
        """Logits (batch, tokens, vocab), and with labels the mean cross-entropy of each next token.

        Args:
          labels: the input's ids; -100 where a token does not count. They are shifted here.
          logits_to_keep: of so many last tokens alone, or of those with these indices.
          others: as of HybridNormModel.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **kept)
