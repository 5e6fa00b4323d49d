"""The configurations of HybridNorm encoders for transformers: what they have besides that of a decoder.

One class for images and one for tokens: transformers remembers one model for each class of configuration.
"""

from .configuration_hybridnorm import DEFAULTS, HybridNormConfig, require

# What a decoder has behind its last norm or before its first, and an encoder in another form or not.
DECODER_ONLY = (
    "vocab_size",
    "embedding_scale",
    "learned_embedding_scale",
    "logits_scale",
    "logits_cap",
    "position_offset",
    "use_cache",
    "alibi_max",
    "alibi_scale",
    "alibi_bfloat16",
)
ENCODER_CHOICES = {
    "positions": ("learned", "rope"),
    "position_scope": ("all", "patches"),
    "pooling": ("class", "mean", "class_and_mean", "attention", "end", "none"),
    "pooling_norm": (None, "rmsnorm", "layernorm"),
}
# What a key means that is not stated: of every encoder, of one of images, and of one of tokens.
ENCODER_DEFAULTS = {name: value for name, value in DEFAULTS.items() if name not in DECODER_ONLY} | {
    "positions": "learned",
    "head_bias": True,
    "causal": False,
    "class_token": True,
    "distillation_token": False,
    "register_tokens": 0,
    "position_scope": "all",
    "norm_pooled_only": False,
    "pooling": "class",
    "pooling_norm": None,
    "distillation_head": False,
}
IMAGE_DEFAULTS = ENCODER_DEFAULTS | {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "patch_bias": True,
    "mask_token": False,
}
TEXT_DEFAULTS = ENCODER_DEFAULTS | {"vocab_size": 49408, "end_token": None}


class HybridNormEncoderConfig(HybridNormConfig):
    """An encoder. Its blocks are those of a decoder, whose keys it has but those of DECODER_ONLY.

    Args:
      causal: a position sees no later ones.
      class_token, distillation_token, register_tokens: learned tokens before all others, in this order; of registers
        the number.
      position_scope: learned positions of "all" tokens, or of "patches" only: of what is read, tokens too.
      max_position_embeddings: rows of the table of learned positions.
      pooling: what stands for the whole input: "class", "mean", "class_and_mean" (one behind the other), "attention"
        (AttentionPooling), "end" (of tokens alone) or "none". The mean is that of what is read.
      pooling_norm: kind of the norm in AttentionPooling; null: that of the norms outside the blocks.
      norm_pooled_only: the last norm is applied to what is pooled, and not to the last hidden state.
      num_labels, id2label: outputs of the head, which reads what is pooled.
      distillation_head: a second head reads the distillation token, and the logits are the mean of both.
    """

    model_type = "hybridnorm_encoder"
    defaults = ENCODER_DEFAULTS

    def __init__(self, **keys):  # transformers would write another one
        super().__init__(**keys)

    @property
    def learned_tokens(self):
        """{name: how many there are} of the learned tokens before all others, in their order."""
        counts = {name: int(getattr(self, name)) for name in ("class_token", "distillation_token", "register_tokens")}
        return {name: count for name, count in counts.items() if count}

    @property
    def num_learned_tokens(self):
        """How many learned tokens stand before all others."""
        return sum(self.learned_tokens.values())

    @property
    def first_position(self):
        """The place in the sequence that the first row of the table of positions belongs to."""
        return 0 if self.position_scope == "all" else self.num_learned_tokens

    @property
    def pooled_width(self):
        """Channels of what the head reads."""
        return 2 * self.whole_width if self.pooling == "class_and_mean" else self.whole_width

    def check(self):
        """Raise ValueError for a value that the model would misread; the message names it. The model calls this."""
        super().check()
        for name, known in ENCODER_CHOICES.items():
            require(name, getattr(self, name), known)
        for name, wanted, is_there in (
            ("distillation_token", "class_token", self.class_token or not self.distillation_token),
            ("distillation_head", "distillation_token", self.distillation_token or not self.distillation_head),
            ("norm_pooled_only", "final_norm", self.final_norm or not self.norm_pooled_only),
        ):
            if not is_there:
                raise ValueError(f"{name}={getattr(self, name)}: needs {wanted}")
        if self.positions == "rope" and self.position_scope != "all":
            raise ValueError(f"position_scope={self.position_scope!r}: positions=rope turns all tokens")
        self.check_pooling()

    def check_pooling(self):
        """As check, of what stands for the whole input."""
        name, heads = f"pooling={self.pooling}", self.num_attention_heads
        if self.pooling in ("class", "class_and_mean") and not self.class_token:
            raise ValueError(f"{name}: needs class_token")
        if self.norm_pooled_only and self.pooling not in ("class", "mean", "end"):
            raise ValueError(f"norm_pooled_only=True: not with {name}")
        if self.pooling == "attention" and self.whole_width % heads:
            raise ValueError(f"num_attention_heads={heads}: with {name} must divide the width {self.whole_width}")
        if self.pooling == "attention" and (self.pooling_norm or self.outer_norm) == "crmsnorm":
            raise ValueError(f"pooling_norm={self.pooling_norm}: with {name} must be rmsnorm or layernorm")


class HybridNormImageEncoderConfig(HybridNormEncoderConfig):
    """An encoder of images.

    Args:
      image_size, patch_size: one number, or [height, width]; pixels behind the last whole patch are not read.
      num_channels, patch_bias: of images, and whether the matrix that embeds a patch has a bias.
      mask_token: a learned token stands in the place of patches that bool_masked_pos names.
    """

    model_type = "hybridnorm_image_encoder"
    defaults = IMAGE_DEFAULTS

    def __init__(self, **keys):
        super().__init__(**keys)

    @property
    def image_shape(self):
        """(height, width) of images."""
        return pair(self.image_size)

    @property
    def patch_shape(self):
        """(height, width) of patches."""
        return pair(self.patch_size)

    @property
    def num_patches(self):
        """Patches of an image."""
        (height, width), (rows, columns) = self.image_shape, self.patch_shape
        return (height // rows) * (width // columns)

    def check(self):
        """As of every encoder."""
        super().check()
        if not self.num_patches:
            raise ValueError(f"patch_size={self.patch_size}: larger than image_size={self.image_size}")
        if self.pooling == "end":
            raise ValueError("pooling='end': only of tokens")
        needed = self.num_patches + self.num_learned_tokens - self.first_position
        if self.positions == "learned" and self.max_position_embeddings != needed:
            raise ValueError(f"max_position_embeddings={self.max_position_embeddings}: must be {needed}")


class HybridNormTextEncoderConfig(HybridNormEncoderConfig):
    """An encoder of tokens.

    Args:
      end_token: pooling "end" reads the first token of this id; null: of the largest id that there is.
    """

    model_type = "hybridnorm_text_encoder"
    defaults = TEXT_DEFAULTS

    def __init__(self, **keys):
        super().__init__(**keys)


def pair(size):
    """(height, width) of one number for both, or of a list of both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
