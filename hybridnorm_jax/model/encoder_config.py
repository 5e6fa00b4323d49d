"""EncoderConfig: everything that decides what an Encoder computes; its keys besides those of ModelConfig."""

import dataclasses

from hybridnorm_jax.config_fields import check_choice, key, spelled
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.config_sizes import LONGEST_CONTEXT, WIDEST

INPUTS = ("pixels", "tokens")
POOLINGS = ("class", "mean", "class_and_mean", "attention", "end", "none")
POSITION_SCOPES = ("all", "patches")
ENCODER_POSITIONS = ("learned", "rope")
LARGEST_IMAGE = 65_536
MOST_REGISTERS = 65_536
# Keys of what a Decoder has behind its last norm or before its first, which an Encoder has in another form or not.
# Further kinds could be had here, once a model asks for one.
POOLING_NORMS = ("rmsnorm", "layernorm")
DECODER_ONLY = (
    "tie_embeddings",
    "embedding_scale",
    "logit_scale",
    "logit_cap",
    "position_offset",
    "learned_embedding_scale",
    "base_width",
)


def check_decoder(config: ModelConfig, source: str, verb: str) -> None:
    """Raise UserError for an encoder, which does not do what is asked.

    Args:
      source: what it was read from, or the name of the argument.
      verb: what an encoder does not do.
    """
    if isinstance(config, EncoderConfig):
        raise UserError(f"{source}: an encoder, which does not {verb}; hn.build_model(config) applies it")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """An encoder of images or tokens: a vision transformer, or a tower of CLIP or SigLIP. Frozen and hashable.

    `dataclasses.replace(config, image_size=...)` keeps the old max_positions unless that is given too; None again makes
    it follow.
    """

    vocab_size: int = key(1, "input=tokens: rows of the token embedding", at_least=1, at_most=16_777_216)
    positions: str = key("learned", " | ".join(ENCODER_POSITIONS))
    head_bias: bool = key(True, "the head has a bias")
    causal: bool = key(False, "a position sees itself and those before it only (CLIP's text tower)")
    input: str = key("pixels", f"what the encoder reads: {' | '.join(INPUTS)}")
    image_size: tuple[int, ...] = key(
        (224, 224), "input=pixels: [height, width] of the images", at_least=1, at_most=LARGEST_IMAGE
    )
    patch_size: tuple[int, ...] = key(
        (16, 16),
        "input=pixels: [height, width] of a patch; pixels behind the last whole patch are not read",
        at_least=1,
        at_most=LARGEST_IMAGE,
    )
    num_channels: int = key(3, "input=pixels: channels of the images", at_least=1, at_most=LARGEST_IMAGE)
    patch_bias: bool = key(True, "input=pixels: the patch embedding has a bias")
    class_token: bool = key(True, "a learned token before all others, which pooling=class reads")
    distillation_token: bool = key(False, "a second learned token, behind the class token (DeiT)")
    register_tokens: int = key(
        0, "learned tokens behind these, which nothing reads at the end", at_least=0, at_most=MOST_REGISTERS
    )
    mask_token: bool = key(False, "input=pixels: a learned token that takes the place of masked patches")
    position_scope: str = key("all", "what has learned positions: all (learned tokens too) | patches")
    norm_pooled_only: bool = key(
        False, "the final norm is applied to what is pooled, not to the last hidden state (CLIP)"
    )
    pooling: str = key("class", f"what stands for the whole input: {' | '.join(POOLINGS)}")
    end_token: int | None = key(
        None,
        "pooling=end: the id whose first position is read (position 0 where there is none); null: the largest id's",
        at_least=0,
        at_most=2**31 - 1,
    )
    pooling_norm: str | None = key(
        None, "pooling=attention: the kind of its norm, as norm; null: that of the final norm"
    )
    num_classes: int | None = key(
        None, "outputs of the head, which reads what is pooled; null: no head", at_least=1, at_most=16_777_216
    )
    distillation_head: bool = key(
        False, "a second head reads the distillation token, and the logits are the mean of both (DeiT)"
    )

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            if isinstance(getattr(self, name), int):
                self._fill(name, (getattr(self, name),) * 2)
        super().__post_init__()
        self._check_input()
        self._check_tokens()
        self._check_pooling()

    @property
    def is_causal(self) -> bool:
        """Whether a position sees no later ones."""
        return self.causal

    @property
    def reads_pixels(self) -> bool:
        """Whether the input is images."""
        return self.input == "pixels"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def learned_tokens(self) -> int:
        """How many learned tokens stand before the patches, or the tokens that are read."""
        return int(self.class_token) + int(self.distillation_token) + self.register_tokens

    @property
    def first_position(self) -> int:
        """The place in the sequence that the first row of the position table belongs to."""
        return 0 if self.position_scope == "all" else self.learned_tokens

    @property
    def positioned_patches_and_tokens(self) -> int:
        """input=pixels: rows of the position table."""
        return self.num_patches + self.learned_tokens - self.first_position

    @property
    def has_outer_norms(self) -> bool:
        """As of ModelConfig; that of attention pooling counts."""
        return super().has_outer_norms or self.pooling == "attention"

    @property
    def pooled_width(self) -> int:
        """Channels of what the head reads."""
        return 2 * self.whole_width if self.pooling == "class_and_mean" else self.whole_width

    def _fill_derived(self) -> None:
        super()._fill_derived()
        fits = len(self.image_size) == len(self.patch_size) == 2
        self._check("image_size", fits, "and model.patch_size must be [height, width], or one number for both")
        if self.reads_pixels and self.positions == "learned" and self.max_positions is None:
            self._fill("max_positions", self.positioned_patches_and_tokens)

    def _check_names(self) -> None:
        super()._check_names()
        check_choice("model.input", self.input, INPUTS)
        check_choice("model.pooling", self.pooling, POOLINGS)
        check_choice("model.position_scope", self.position_scope, POSITION_SCOPES)
        check_choice("model.positions", self.positions, ENCODER_POSITIONS)
        if self.pooling_norm is not None:
            check_choice("model.pooling_norm", self.pooling_norm, POOLING_NORMS)

    def _check_input(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in DECODER_ONLY:
            self._check(name, getattr(self, name) == defaults[name], "an Encoder does not have it")
        if not self.reads_pixels:
            only = "only for model.input=pixels"
            for name in ("image_size", "patch_size", "num_channels", "patch_bias", "mask_token"):
                self._check(name, getattr(self, name) == defaults[name], only)
            return
        self._check("vocab_size", self.vocab_size == defaults["vocab_size"], "only for model.input=tokens")
        self._check("patch_size", self.num_patches > 0, f"larger than model.image_size={spelled(self.image_size)}")
        self._check("image_size", self.num_patches <= LONGEST_CONTEXT, f"makes {self.num_patches} patches")
        numbers = self.d_model * self.num_channels * self.patch_size[0] * self.patch_size[1]
        self._check("patch_size", numbers <= WIDEST**2, f"makes a patch embedding of {numbers:.1e} parameters")
        if self.positions == "learned":
            needed = self.positioned_patches_and_tokens
            learned = needed - self.num_patches
            right = f"must be {needed}: {self.num_patches} patches and {learned} learned tokens; null: as it must be"
            self._check("max_positions", self.max_positions == needed, right)

    def _check_tokens(self) -> None:
        right = "needs model.class_token, behind which it stands"
        self._check("distillation_token", self.class_token or not self.distillation_token, right)
        right = "needs model.distillation_token, which it reads, and model.num_classes"
        can_read = self.distillation_token and self.num_classes is not None
        self._check("distillation_head", can_read or not self.distillation_head, right)
        right = "model.positions=rope turns all tokens"
        self._check("position_scope", self.positions == "learned" or self.position_scope == "all", right)

    def _check_pooling(self) -> None:
        needs_class = self.pooling in ("class", "class_and_mean")
        self._check("pooling", self.class_token or not needs_class, "needs model.class_token")
        self._check("pooling", self.pooling != "end" or not self.reads_pixels, "only for model.input=tokens")
        self._check("end_token", self.pooling == "end" or self.end_token is None, "only for model.pooling=end")
        only = "only for model.pooling=attention"
        self._check("pooling_norm", self.pooling == "attention" or self.pooling_norm is None, only)
        divides = self.pooling != "attention" or self.whole_width % self.num_heads == 0
        right = f"must divide the width of what is pooled, {self.whole_width}"
        self._check("num_heads", divides, right)
        right = "needs something pooled, model.pooling is none"
        self._check("num_classes", self.num_classes is None or self.pooling != "none", right)
        right = "needs something pooled that has no norm of its own"
        can = self.pooling in ("class", "end", "mean")
        self._check("norm_pooled_only", can or not self.norm_pooled_only, f"{right}; model.pooling={self.pooling}")
        right = f"model.scheme={self.scheme} has no norm behind its blocks"
        self._check("norm_pooled_only", self.has_final_norm or not self.norm_pooled_only, right)
        has_norm = self.outer_norm in POOLING_NORMS or self.pooling_norm is not None
        right = f"{self.outer_norm} is no norm for pooling; set rmsnorm or layernorm"
        self._check("pooling_norm", has_norm or self.pooling != "attention", right)
