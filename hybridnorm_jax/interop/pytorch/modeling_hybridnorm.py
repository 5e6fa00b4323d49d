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
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .block_hybridnorm import HybridNormBlock, HybridNormPreTrainedModel
from .norms_hybridnorm import JoinedStreams, LayerScale, capped, into_blocks, outer_norm, times
from .positions_hybridnorm import check_growth, masks, positions_of, rotations, sinusoids
from .sphere_hybridnorm import logit_scales, wide

# transformers renamed it in 5.x. Both names are taken; this is the one that outputs have.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HybridNormModel(HybridNormPreTrainedModel):
    """Everything but the head."""

    def __init__(self, config):
        super().__init__(config)
        config.check()
        width = config.whole_width
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.position_offset + config.max_position_embeddings, width)
        self.embedding_scale = LayerScale(1, width**0.5) if config.learned_embedding_scale else nn.Identity()
        self.embedding_norm = outer_norm(config, config.embedding_norm)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([HybridNormBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.streams = JoinedStreams(config)
        self.norm = outer_norm(config, config.final_norm)
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
        if not (torch.compiler.is_compiling() or position_ids.is_meta):  # a look at values would break a graph
            check_growth(self.config, position_ids, past)
        by_window = masks(self.config, attention_mask, queries, past, slots, x.device, x.dtype)
        turns = rotations(self.config, position_ids, x.dtype)
        x = self.embedding_scale(self.with_positions(times(self.config.embedding_scale, x), position_ids))
        x = into_blocks(self.config, self.dropout(self.embedding_norm(x)))
        place = None if cache is None else torch.arange(queries, device=x.device) + past
        side, streams = self.streams.begun(x), ()
        for block in self.layers:
            streams += (x,) if keeps else ()  # kept without need, they would fill the memory
            x, side = block(x, side, turns=turns, masks=by_window, cache=cache, place=place)
        x = self.norm(self.streams(x, side))
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
        return x + sinusoids(rows, config.whole_width, x.dtype)

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
        self.lm_head = nn.Linear(config.whole_width, config.vocab_size, bias=config.head_bias)
        self.logit_scales = logit_scales(config, config.vocab_size, config.whole_width)
        self.post_init()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As of every model. What a compiled forward pass cannot check of positions is checked here."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache, position_ids = inputs.get(CACHE), inputs.get("position_ids")
        if cache is not None and position_ids is not None:
            check_growth(self.config, position_ids, cache.get_seq_length())
        return inputs

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
        logits = self.logit_scales(self.lm_head(hidden[:, kept]))
        if self.config.logits_scale is not None or self.config.logits_cap is not None:
            logits = capped(self.config.logits_cap, times(self.config.logits_scale, wide(logits)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept = {CACHE: getattr(outputs, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **kept)
