"""Encoders of images or tokens whose norms stand where their configuration says, in PyTorch for transformers 5.

The blocks are those of the decoders (block_hybridnorm.py). Here is what encoders alone have.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .block_hybridnorm import HybridNormBlock, HybridNormPreTrainedModel
from .encoder_configuration_hybridnorm import (
    HybridNormEncoderConfig,
    HybridNormImageEncoderConfig,
    HybridNormTextEncoderConfig,
)
from .encoder_parts_hybridnorm import (
    AttentionPooling,
    LearnedTokens,
    PatchEmbedding,
    mean_of,
)
from .norms_hybridnorm import JoinedStreams, into_blocks, outer_norm
from .positions_hybridnorm import masks, rotations
from .sphere_hybridnorm import logit_scales


class HybridNormEncoderPreTrainedModel(HybridNormPreTrainedModel):
    """What transformers asks of an encoder."""

    config_class = HybridNormEncoderConfig

    @torch.no_grad()
    def _init_weights(self, module):
        """As a decoder's; patch embeddings as linear layers, learned tokens as embeddings."""
        super()._init_weights(module)
        if isinstance(module, (PatchEmbedding, LearnedTokens)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class HybridNormEncoder(HybridNormEncoderPreTrainedModel):
    """Everything between what is read and the heads. Its subclasses read images or tokens."""

    def __init__(self, config):
        super().__init__(config)
        config.check()
        width = config.whole_width
        self.make_reader(config)
        for name, count in config.learned_tokens.items():
            setattr(self, name, LearnedTokens(count, width))
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.embedding_norm = outer_norm(config, config.embedding_norm)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([HybridNormBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.streams = JoinedStreams(config)
        self.norm = outer_norm(config, config.final_norm)
        self.pooling = AttentionPooling(config) if config.pooling == "attention" else None
        self.gradient_checkpointing = False
        self.post_init()

    def make_reader(self, config):
        """Modules that embed what is read."""
        raise NotImplementedError

    def encoded(self, read, ids=None, is_token=None, keeps=None):
        """last_hidden_state (batch, positions, width), learned tokens first, and pooler_output.

        Args:
          read: (batch, patches or tokens, width). ids: of these tokens.
          is_token: (batch, tokens), 0 at padding; None: there is no padding.
          keeps: whether the stream before each block is returned, too, as hidden_states.
        """
        config = self.config
        learned = [getattr(self, name)(read.shape[0]) for name in config.learned_tokens]
        x = torch.cat([*learned, read], dim=1) if learned else read
        x = self.dropout(self.embedding_norm(self.with_positions(x)))
        x = into_blocks(config, x)
        sees = None if is_token is None else F.pad(is_token, (config.num_learned_tokens, 0), value=1)
        by_window = masks(config, sees, x.shape[1], 0, None, x.device, x.dtype)
        turns = rotations(config, torch.arange(x.shape[1], device=x.device)[None], x.dtype)
        keeps = config.output_hidden_states if keeps is None else keeps
        side, streams = self.streams.begun(x), ()
        for block in self.layers:
            streams += (x,) if keeps else ()
            x, side = block(x, side, turns=turns, masks=by_window)
        x = self.streams(x, side)
        hidden = x if config.norm_pooled_only else self.norm(x)
        pooled = self.pooled(hidden, ids, is_token, sees)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=self.norm(pooled) if config.norm_pooled_only else pooled,
            hidden_states=(*streams, hidden) if keeps else None,
        )

    def with_positions(self, x):
        """The tokens plus learned positions, where there are any."""
        if self.config.positions != "learned":
            return x
        first, table = self.config.first_position, self.embed_positions.weight
        count = x.shape[1] - first
        if count > table.shape[0]:
            raise ValueError(f"{count} positions, but max_position_embeddings={table.shape[0]}")
        return x + F.pad(table[:count], (0, 0, first, 0))

    def pooled(self, hidden, ids, is_token, sees):
        """What stands for the whole input, (batch, width); None where nothing does."""
        config = self.config
        first = config.num_learned_tokens
        match config.pooling:
            case "class":
                return hidden[:, 0]
            case "mean":
                return mean_of(hidden[:, first:], is_token)
            case "class_and_mean":
                return torch.cat([hidden[:, 0], mean_of(hidden[:, first:], is_token)], dim=-1)
            case "attention":
                return self.pooling(hidden, None if sees is None else sees.bool())
            case "end":
                marks = ids if config.end_token is None else (ids == config.end_token).int()
                end = first + marks.argmax(dim=1)  # the first of equal ones
                return hidden[torch.arange(hidden.shape[0], device=hidden.device), end]
        return None


class HybridNormImageEncoder(HybridNormEncoder):
    """An encoder of images without a head."""

    config_class = HybridNormImageEncoderConfig
    main_input_name = "pixel_values"
    _input_embed_layer = "embed_patches"

    def make_reader(self, config):
        """The patch embedding, and the mask token."""
        self.embed_patches = PatchEmbedding(config)
        self.mask_token = LearnedTokens(1, config.whole_width) if config.mask_token else None

    @can_return_tuple
    def forward(self, pixel_values, bool_masked_pos=None, output_hidden_states=None, **kwargs):
        """last_hidden_state and pooler_output.

        Args:
          pixel_values: (batch, channels, height, width) of image_size.
          bool_masked_pos: (batch, patches), 1 where the mask token stands in the place of a patch.
          kwargs: what transformers hands to every model and this one has no use for.
        """
        x = self.embed_patches(pixel_values)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos: the model has no mask token")
            x = torch.where(bool_masked_pos.bool()[..., None], self.mask_token(x.shape[0]), x)
        return self.encoded(x, keeps=output_hidden_states)


class HybridNormTextEncoder(HybridNormEncoder):
    """An encoder of tokens without a head."""

    config_class = HybridNormTextEncoderConfig
    main_input_name = "input_ids"

    def make_reader(self, config):
        """The token embedding."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.whole_width)

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, output_hidden_states=None, **kwargs):
        """last_hidden_state and pooler_output.

        Args:
          input_ids: (batch, tokens).
          attention_mask: (batch, tokens), 0 at padding, which stands behind the tokens: positions are counted with it.
          kwargs: what transformers hands to every model and this one has no use for.
        """
        return self.encoded(self.embed_tokens(input_ids), input_ids, attention_mask, output_hidden_states)


class HybridNormEncoderWithHead(HybridNormEncoderPreTrainedModel):
    """An encoder with a head, and with a second one for the distillation token where there is that."""

    encoder_class = output_class = None

    def __init__(self, config):
        super().__init__(config)
        if config.pooling == "none":
            raise ValueError("pooling='none': a head needs something pooled")
        self.num_labels = config.num_labels
        self.model = self.encoder_class(config)
        self.classifier = nn.Linear(config.pooled_width, config.num_labels, bias=config.head_bias)
        self.logit_scales = logit_scales(config, config.num_labels, config.pooled_width)
        self.distillation_classifier = None
        if config.distillation_head:
            self.distillation_classifier = nn.Linear(config.whole_width, config.num_labels, bias=config.head_bias)
            self.distillation_scales = logit_scales(config, config.num_labels, config.whole_width)
        self.post_init()

    def classified(self, features, labels, **kwargs):
        """Logits (batch, num_labels), and the loss where there are labels."""
        logits = self.logit_scales(self.classifier(features.pooler_output))
        if self.distillation_classifier is not None:
            distilled = self.distillation_classifier(features.last_hidden_state[:, 1])
            logits = (logits + self.distillation_scales(distilled)) / 2
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return self.output_class(loss=loss, logits=logits, hidden_states=features.hidden_states)


class HybridNormForImageClassification(HybridNormEncoderWithHead):
    """An encoder of images with its head."""

    config_class = HybridNormImageEncoderConfig
    main_input_name = "pixel_values"
    encoder_class, output_class = HybridNormImageEncoder, ImageClassifierOutput

    @can_return_tuple
    def forward(self, pixel_values, labels=None, bool_masked_pos=None, output_hidden_states=None, **kwargs):
        """Logits, and with labels (batch,) the loss. Other arguments are those of HybridNormImageEncoder."""
        features = self.model(pixel_values, bool_masked_pos, output_hidden_states, return_dict=True)
        return self.classified(features, labels, **kwargs)


class HybridNormForSequenceClassification(HybridNormEncoderWithHead):
    """An encoder of tokens with its head."""

    config_class = HybridNormTextEncoderConfig
    main_input_name = "input_ids"
    encoder_class, output_class = HybridNormTextEncoder, SequenceClassifierOutput

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, labels=None, output_hidden_states=None, **kwargs):
        """Logits, and with labels (batch,) the loss. Other arguments are those of HybridNormTextEncoder."""
        features = self.model(input_ids, attention_mask, output_hidden_states, return_dict=True)
        return self.classified(features, labels, **kwargs)
