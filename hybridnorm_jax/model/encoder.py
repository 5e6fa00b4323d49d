"""The encoder of images or tokens: embedding, the same runs of blocks as a Decoder's, pooling, head.

docs/parameters.md lists its parameter tree.
"""

from functools import partial

import flax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.model.block import Dropout, SharedInputs
from hybridnorm_jax.model.embedding import Embedding, Head
from hybridnorm_jax.model.encoder_config import EncoderConfig
from hybridnorm_jax.model.encoder_parts import (
    AttentionPooling,
    LearnedTokens,
    PatchEmbedding,
    Pixels,
)
from hybridnorm_jax.model.formula import Stream
from hybridnorm_jax.model.initializers import std_factor
from hybridnorm_jax.model.input_checks import check_per_token, check_tokens
from hybridnorm_jax.model.layers import through_layers
from hybridnorm_jax.model.outside import into_blocks, outer_norm
from hybridnorm_jax.model.rotation import default_positions, rotations
from hybridnorm_jax.model.side_stream import JoinedStreams, begun
from hybridnorm_jax.model.watched_streams import watch_streams

Tokens = Int[Array, "batch seq"]
Logits = Float[Array, "batch classes"]


@flax.struct.dataclass
class EncoderOutput:
    """What an encoder without a head gives.

    Attributes:
      last_hidden_state: of all positions, learned tokens first, behind the final norm; with norm_pooled_only before it.
      pooled: what stands for the whole input; None with pooling=none.
    """

    last_hidden_state: Stream
    pooled: Float[Array, "batch embed"] | None


class Encoder(nn.Module):
    """A transformer without a causal mask whose norms stand where config.scheme says; reads images or tokens.

        encoder = hn.Encoder(hn.EncoderConfig(scheme="pre", image_size=32, patch_size=4, num_classes=10))
        params = encoder.init(key, pixels)["params"]
        logits = encoder.apply({"params": params}, pixels)

    `init` gives the tree of docs/parameters.md; `apply` logits (batch, classes), float32 or wider, or an EncoderOutput
    where config.num_classes is None. Source: ViT (2010.11929).

    Attributes:
      config: sizes, kinds and dtypes.
    """

    config: EncoderConfig

    def setup(self) -> None:
        config = self.config
        std = config.init_std * std_factor(config.initializer_name, "outer", 0, config.num_layers)
        width, dtype, param_dtype = config.whole_width, config.dtype, config.param_dtype
        initializer = config.initializer_name
        embedding = partial(
            Embedding, width=width, std=std, initializer=initializer, dtype=dtype, param_dtype=param_dtype
        )
        learned = partial(LearnedTokens, width=width, std=std, dtype=dtype, param_dtype=param_dtype)
        if config.reads_pixels:
            self.patch_embedding = PatchEmbedding(
                patch_size=(config.patch_size[0], config.patch_size[1]),
                width=width,
                use_bias=config.patch_bias,
                std=std,
                dtype=dtype,
                param_dtype=param_dtype,
            )
        else:
            self.token_embedding = embedding(rows=config.vocab_size)
        if config.mask_token:
            self.mask_token = learned(count=1)
        if config.class_token:
            self.class_token = learned(count=1)
        if config.distillation_token:
            self.distillation_token = learned(count=1)
        if config.register_tokens:
            self.register_tokens = learned(count=config.register_tokens)
        if config.positions == "learned":
            self.position_embedding = embedding(rows=present(config.max_positions))
        if config.has_embedding_norm:
            self.embedding_norm = outer_norm(config)
        self.streams = JoinedStreams(config)
        if config.has_final_norm:
            self.final_norm = outer_norm(config)
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config)
        head = partial(
            Head,
            std=std,
            initializer=initializer,
            use_bias=config.head_bias,
            param_dtype=config.param_dtype,
            learned_scales=config.scheme_rule.sphere,
        )
        if config.num_classes is not None:
            self.head = head(config.num_classes)
        if config.distillation_head:
            self.distillation_head = head(present(config.num_classes))
        self.dropout = Dropout(config.dropout)

    @nn.compact
    def __call__(
        self,
        inputs: Pixels | Tokens,
        *,
        masked: Bool[Array, "batch patches"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        return_features: bool = False,
        step: Int[Array, ""] | int | None = None,
    ) -> Logits | EncoderOutput:
        """Logits, or an EncoderOutput where there is no head.

        Args:
          inputs: pixels (batch, height, width, channels) of config.image_size, or tokens (batch, seq).
          masked: patches in whose place the mask token stands.
          segment_ids: of every position, learned tokens too; those of one id see each other only.
          deterministic: False switches dropout on and needs a "dropout" key.
          return_features: an EncoderOutput where there is a head, too. In `init` that leaves the head out.
          step: of training, where branches of the scheme grow with it, see ramps.py: how many updates were made.

        Raises:
          ValueError: a shape that does not fit the configuration; names the argument.
        """
        config = self.config
        stream = self._embedded(inputs, masked)
        check_per_token("segment_ids", segment_ids, batch=stream.shape[0], seq=stream.shape[1])
        stream = nn.with_logical_constraint(self.dropout(stream, deterministic=deterministic), ("batch", "seq", None))
        streams = watch_streams(self, begun(config, into_blocks(config, stream)))
        turns = rotations(config, default_positions(stream.shape[1]), config.dtype)
        shared = SharedInputs(segment_ids=segment_ids, rotations=turns)
        streams = through_layers(self, streams, shared, deterministic=deterministic, step=step)
        features = self._features(self.streams(streams), inputs)
        if config.num_classes is None or return_features:
            return features
        return self._logits(features)

    def _embedded(self, inputs: Pixels | Tokens, masked: Bool[Array, "batch patches"] | None) -> Stream:
        """Learned tokens and what is read, with positions and the norm after the embedding."""
        config = self.config
        if config.reads_pixels:
            _check_pixels(inputs, config)
            read = self._with_mask(self.patch_embedding(inputs), masked)
        else:
            check_tokens(inputs)
            if masked is not None:
                raise ValueError("masked: only patches of images are masked")
            read = self.token_embedding(inputs)
        learned = [
            getattr(self, name)()
            for name in ("class_token", "distillation_token", "register_tokens")
            if getattr(config, name)
        ]
        if learned:
            before = jnp.concatenate(learned)
            stream = jnp.concatenate([jnp.broadcast_to(before, (read.shape[0], *before.shape)), read], axis=1)
        else:
            stream = read
        if config.positions == "learned":
            stream = self._with_positions(stream)
        return self.embedding_norm(stream) if config.has_embedding_norm else stream

    def _with_mask(self, patches: Stream, masked: Bool[Array, "batch patches"] | None) -> Stream:
        if masked is None:
            if self.config.mask_token and self.is_initializing():
                self.mask_token()
            return patches
        if not self.config.mask_token:
            raise ValueError("masked: the model has no mask token; set model.mask_token")
        check_per_token("masked", masked, batch=patches.shape[0], seq=patches.shape[1])
        return jnp.where(masked[..., None], self.mask_token()[None], patches)

    def _with_positions(self, stream: Stream) -> Stream:
        first, length = self.config.first_position, stream.shape[1]
        rows = present(self.config.max_positions)
        if length - first > rows:
            raise ValueError(f"{length - first} positions, but model.max_positions={rows}")
        positions = self.position_embedding(default_positions(length - first))
        return stream + jnp.pad(positions, ((0, 0), (first, 0), (0, 0)))

    def _features(self, stream: Stream, inputs: Pixels | Tokens) -> EncoderOutput:
        """What comes out of the blocks, normalized and pooled."""
        config = self.config
        last_norm = self.final_norm if config.has_final_norm else lambda x: x
        if config.norm_pooled_only:
            pooled = self._pooled(stream, inputs)
            return EncoderOutput(last_hidden_state=stream, pooled=last_norm(present(pooled)))
        hidden = last_norm(stream)
        return EncoderOutput(last_hidden_state=hidden, pooled=self._pooled(hidden, inputs))

    def _pooled(self, hidden: Stream, inputs: Pixels | Tokens) -> Float[Array, "batch embed"] | None:
        config = self.config
        match config.pooling:
            case "class":
                return hidden[:, 0]
            case "mean":
                return self._mean_of_read(hidden)
            case "class_and_mean":
                return jnp.concatenate([hidden[:, 0], self._mean_of_read(hidden)], axis=-1)
            case "attention":
                return self.pooling(hidden)
            case "end":
                marks = inputs if config.end_token is None else inputs == config.end_token
                end = config.learned_tokens + jnp.argmax(marks, axis=1)  # the first of equal ones
                return jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        return None

    def _mean_of_read(self, hidden: Stream) -> Float[Array, "batch embed"]:
        """The mean over patches, or tokens, without the learned ones; summed in float32 at least."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return hidden[:, self.config.learned_tokens :].mean(1, dtype=wide).astype(hidden.dtype)

    def _logits(self, features: EncoderOutput) -> Logits:
        logits = self.head(present(features.pooled)[:, None])[:, 0]
        if not self.config.distillation_head:
            return logits
        return (logits + self.distillation_head(features.last_hidden_state[:, 1:2])[:, 0]) / 2


def _check_pixels(pixels: Pixels, config: EncoderConfig) -> None:
    """Positions are learned for this size of images, and are not interpolated."""
    height, width = config.image_size
    right = (height, width, config.num_channels)
    if pixels.ndim != 4 or pixels.shape[1:] != right:
        raise ValueError(f"pixels: shape {pixels.shape} must be (batch, {height}, {width}, {config.num_channels})")
