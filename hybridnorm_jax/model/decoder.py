"""The language model: embedding, runs of blocks under nn.scan, head.

docs/parameters.md lists its parameter tree, plain nested dicts of arrays. `run_<i>` holds consecutive layers of one
structure (runs.py), first to last, stacked along the first axis of every leaf.
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.model.block import Dropout, SharedInputs
from hybridnorm_jax.model.cache import Slots
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.embedding import Embedding, EmbeddingScale, Head
from hybridnorm_jax.model.formula import Stream
from hybridnorm_jax.model.initializers import end_std
from hybridnorm_jax.model.input_checks import check_per_token, check_tokens
from hybridnorm_jax.model.layers import through_layers
from hybridnorm_jax.model.outside import into_blocks, outer_norm
from hybridnorm_jax.model.rotation import default_positions, rotations
from hybridnorm_jax.model.side_stream import JoinedStreams, begun
from hybridnorm_jax.model.sinusoids import sinusoids
from hybridnorm_jax.model.watched_streams import watch_streams
from hybridnorm_jax.model.width_scaling import std_for_width


class Decoder(nn.Module):
    """A causal language model whose norms stand where config.scheme says.

    `Decoder(config).init(key, tokens)["params"]` is the tree of docs/parameters.md;
    `.apply({"params": params}, tokens)` gives logits (batch, seq, vocab), float32 or wider, and
    `.apply({"params": params}, tokens, return_hidden=True)` what the head would read.

    Attributes:
      config: sizes, kinds and dtypes.
      unrolled: no loop over the layers. Each has parameters of its own, `layer_<i>`, without the axis of layers. Then
        the compile time grows with the number of layers. generation/ready_parameters.py says what it is good for.
    """

    config: ModelConfig
    unrolled: bool = False

    def setup(self) -> None:
        config = self.config
        std_of = partial(end_std, config.initializer_name, init_std=config.init_std, width=config.stated_width)
        embedding = partial(
            Embedding,
            width=config.whole_width,
            std=std_of("head" if config.tie_embeddings else "embedding"),
            initializer=config.initializer_name,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )
        self.token_embedding = embedding(rows=config.vocab_size, scale=config.embedding_scale)
        if config.positions == "learned":
            self.position_embedding = embedding(rows=config.position_offset + present(config.max_positions))
        if config.learned_embedding_scale:
            self.embedding_scale = EmbeddingScale(config.stated_width, jnp.dtype(config.param_dtype))
        if config.has_embedding_norm:
            self.embedding_norm = outer_norm(config)
        self.streams = JoinedStreams(config)
        if config.has_final_norm:
            self.final_norm = outer_norm(config)
        self.head = Head(
            config.vocab_size,
            std=std_of("head") * std_for_width("output", config.width_ratio),
            initializer=config.initializer_name,
            use_bias=config.head_bias,
            param_dtype=config.param_dtype,
            scale=config.logit_scale,
            learned_scales=config.scheme_rule.sphere,
            cap=config.logit_cap,
        )
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        return_hidden: bool = False,
        step: Int[Array, ""] | int | None = None,
        slots: Slots | None = None,
    ) -> Float[Array, "batch seq vocab"] | Float[Array, "batch seq embed"]:
        """Logits of the next token at every position.

        Args:
          positions: of each token in its document; 0, 1, ... by default.
          segment_ids: tokens attend to earlier tokens of the same id only.
          deterministic: False switches dropout on and needs a "dropout" key.
          return_hidden: return what the head reads (batch, seq, embed) in the compute dtype, and skip the head. In
            `init` that leaves the head's parameters out.
          step: of training, where branches of the scheme grow with it, see ramps.py: how many updates were made.
          slots: keep keys and values in the collection CACHE, and with a single token per sequence attend to those that
            are kept (cache.py). Positions must be given, and the model must be `unrolled`.
        """
        hidden = self.hidden(
            tokens, positions=positions, segment_ids=segment_ids, deterministic=deterministic, step=step, slots=slots
        )
        return hidden if return_hidden else self.logits(hidden)

    @nn.compact
    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        step: Int[Array, ""] | int | None = None,
        slots: Slots | None = None,
        rows: Stream | None = None,
    ) -> Stream:
        """What the head reads, in the compute dtype; arguments as in `__call__`.

        Args:
          rows: of the token embedding, where they are looked up already.
        """
        config = self.config
        if slots is not None and not self.unrolled:
            raise ValueError("slots: a model with a loop over its layers keeps nothing; build it with unrolled=True")
        check_tokens(tokens)
        for name, array in (("positions", positions), ("segment_ids", segment_ids)):
            check_per_token(name, array, batch=tokens.shape[0], seq=tokens.shape[1])
        if positions is None:
            positions = default_positions(tokens.shape[1])
        stream = self.token_embedding(tokens, rows)
        if config.max_positions is not None:
            if slots is None:  # whose padding has positions, too
                self._check_length(tokens.shape[1])
            stream = stream + self._of_positions(positions + config.position_offset)
        if config.learned_embedding_scale:
            stream = self.embedding_scale(stream)
        if config.has_embedding_norm:
            stream = self.embedding_norm(stream)
        stream = nn.with_logical_constraint(self.dropout(stream, deterministic=deterministic), ("batch", "seq", None))
        streams = watch_streams(self, begun(config, into_blocks(config, stream)))

        shared = SharedInputs(
            segment_ids=segment_ids,
            rotations=rotations(config, positions, config.dtype),
            positions=positions if config.positions == "alibi" else None,
            slots=slots,
        )
        streams = through_layers(self, streams, shared, deterministic=deterministic, step=step, unrolled=self.unrolled)
        stream = self.streams(streams)
        return self.final_norm(stream) if config.has_final_norm else stream

    def logits(self, hidden: Stream) -> Float[Array, "batch seq vocab"]:
        """The head alone."""
        tied = self.token_embedding.embedding if self.config.tie_embeddings else None
        return nn.with_logical_constraint(self.head(hidden, tied), ("batch", "seq", "vocab"))

    def _of_positions(self, rows: Int[Array, "batch seq"]) -> Stream:
        """These rows of the table of positions, learned or fixed."""
        if self.config.positions == "learned":
            return self.position_embedding(rows)
        return sinusoids(rows, self.config.whole_width, self.config.dtype)

    def _check_length(self, length: int) -> None:
        largest = present(self.config.max_positions)
        if length > largest:
            raise ValueError(f"{length} tokens, but model.max_positions={largest}")
