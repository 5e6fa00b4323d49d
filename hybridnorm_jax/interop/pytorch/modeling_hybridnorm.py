"""Decoders whose norms stand where their configuration says, in PyTorch for transformers 5.

Every sublayer, attention or feed-forward, of every placement is `apply_formula` (norms_hybridnorm.py). A placement is
data: of each layer config.json says which norms and scales of the formula are there.

The names of the linear layers, for LoRA and the like: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj,
router. The weights of experts are parameters of `Experts` with a leading axis.

Statistics of norms, the rotation, the router and the scales of the formula are computed in float32 at least. No buffer
is computed in a constructor.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention_hybridnorm import Attention
from .configuration_hybridnorm import HybridNormConfig
from .feed_forward_hybridnorm import Experts, FeedForward, MixtureOfExperts
from .norms_hybridnorm import (
    LayerScale,
    Norm,
    apply_formula,
    capped,
    placement_of,
    stream_norm,
    times,
    wide,
)
from .positions_hybridnorm import masks, positions_of, rotations, sinusoids

# transformers renamed it in 5.x. Both names are taken; this is the one that outputs have.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HybridNormBlock(GradientCheckpointingLayer):
    """Attention and feed-forward, each by the formula."""

    def __init__(self, config, layer):
        super().__init__()
        self.placement = placement_of(config, layer)
        self.self_attn = Attention(config, layer, self.placement)
        has_experts = config.num_experts and layer not in config.dense_layers
        self.mlp = MixtureOfExperts(config) if has_experts else FeedForward(config, config.dense_width)
        self.dropout = nn.Dropout(config.dropout)
        for name in ("attention", "feed_forward"):
            parts = getattr(self.placement, name)
            has_pre = parts.pre and not (name == "feed_forward" and self.placement.shared_pre_norm)
            setattr(self, f"{name}_pre_norm", stream_norm(config, has_pre))
            setattr(self, f"{name}_branch_norm", stream_norm(config, parts.branch, parts.branch_norm_init))
            setattr(self, f"{name}_post_norm", stream_norm(config, parts.post))
            setattr(
                self, f"{name}_layer_scale", LayerScale(config.hidden_size) if config.layer_scale else nn.Identity()
            )

    def forward(self, x, turns=None, masks=None, cache=None, place=None):
        """The stream (batch, tokens, width) after this block."""

        def attend(x):
            return self.dropout(self.self_attn(x, turns, masks, cache, place))

        def feed_forward(x):
            return self.dropout(self.mlp(x))

        attention_norms, feed_forward_norms = self.norms("attention"), self.norms("feed_forward")
        if self.placement.shared_pre_norm:  # computed once: both branches read the block's input
            normalized = self.attention_pre_norm(x)
            attention_norms[0] = feed_forward_norms[0] = lambda _: normalized
        y = apply_formula(attend, x, x, self.placement.attention, attention_norms)
        return apply_formula(feed_forward, y, x, self.placement.feed_forward, feed_forward_norms)

    def norms(self, name):
        """The norms of a branch; behind the branch norm stands the layer scale, where there is one."""
        pre, branch, post = (getattr(self, f"{name}_{which}_norm") for which in ("pre", "branch", "post"))
        scale = getattr(self, f"{name}_layer_scale")
        return [pre, branch if isinstance(scale, nn.Identity) else lambda x: scale(branch(x)), post]


class HybridNormPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model: what it can do, and how fresh weights are drawn."""

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
        if isinstance(module, LayerScale):
            nn.init.ones_(module.weight)
        for name in ("bias", "gate_bias", "up_bias", "down_bias", "balance_bias", "sinks"):
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
        by_window = masks(self.config, attention_mask, queries, past, slots, x.device, x.dtype)
        turns = rotations(self.config, position_ids, x.dtype)
        x = self.dropout(self.embedding_norm(self.with_positions(times(self.config.embedding_scale, x), position_ids)))
        place = None if cache is None else torch.arange(queries, device=x.device) + past
        streams = ()
        for block in self.layers:
            streams += (x,) if keeps else ()  # kept without need, they would fill the memory
            x = block(x, turns=turns, masks=by_window, cache=cache, place=place)
        x = self.norm(x)
        streams = (*streams, x) if keeps else None
        kept = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=streams, **kept)

    def with_positions(self, x, position_ids):
        """The embedded tokens plus what a table says of their positions, if there is a table."""
        config = self.config
        if config.positions not in ("learned", "sinusoidal"):
            return x
        self.check_positions(position_ids)
        rows = position_ids + config.position_offset
        if config.positions == "learned":
            return x + self.embed_positions(rows)
        return x + sinusoids(rows, config.hidden_size, x.dtype)

    def check_positions(self, position_ids):
        """Raise ValueError where the table has no row for a position."""
        count = self.config.max_position_embeddings
        is_hidden = torch.compiler.is_compiling() or position_ids.is_meta  # a look at values would break a graph
        last = position_ids.shape[-1] - 1 if is_hidden else int(position_ids.max())
        if last >= count:
            raise ValueError(f"position {last}, counted from 0, but max_position_embeddings={count}")


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
        if self.config.logits_scale is not None or self.config.logits_cap is not None:
            logits = capped(self.config.logits_cap, times(self.config.logits_scale, wide(logits)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **kept)
