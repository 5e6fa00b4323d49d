"""The language model: embedding, runs of blocks under nn.scan, head.

docs/parameters.md lists its parameter tree, plain nested dicts of arrays. `run_<i>` holds consecutive layers of one
structure (placement.runs), first to last, stacked along the first axis of every leaf.
"""

from collections.abc import Mapping
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import LazyRng
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.kernels.backend_names import SAVED
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.model.attention import Rotation, default_positions, rotation
from hybridnorm_jax.model.block import (
    DEFECT,
    STREAM,
    Block,
    Dropout,
    LayerInputs,
    SharedInputs,
    Stream,
    stream_norm,
    watch_stream,
)
from hybridnorm_jax.model.cache import Slots
from hybridnorm_jax.model.config import AUTO_REMAT, ModelConfig
from hybridnorm_jax.model.embedding import Embedding, Head
from hybridnorm_jax.model.initializers import std_factor
from hybridnorm_jax.model.input_checks import check_per_token, check_tokens
from hybridnorm_jax.model.moe import CHOSEN, ROUTER
from hybridnorm_jax.model.placement import Run, Scales
from hybridnorm_jax.model.signal_measures import PROBE, SIGNAL

_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)
# Of every layer its own.
COLLECTIONS = ("params", "intermediates", STREAM, DEFECT, ROUTER, CHOSEN, SIGNAL, PROBE)
# The streams of keys that a block draws from.
KEYS = ("params", "dropout")
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "all_but_attention": _ATTENTION,
    # With attention's result kept, the scores it came from, which are products too, need not be.
    "dots": jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.checkpoint_dots, _ATTENTION),
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


class ScannedBlock(Block):
    """Block as nn.scan calls it, with what differs between the layers of a run as scanned inputs.

    Attributes:
      deterministic: no dropout.
    """

    deterministic: bool = True

    def __call__(  # type: ignore[override]
        self, stream: Stream, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[Stream, None]:
        """(stream after this block, None)."""
        # Flax folds a module's path into its keys, and the path of this block says which run it belongs to. So it gets
        # the layer's own keys, into which Flax then folds the path inside the block. No child may exist before this.
        present(self.scope).rngs = {name: LazyRng.create(key) for name, key in layer.keys.items()}
        return self.transform(stream, layer, shared, deterministic=self.deterministic), None


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
        factor = std_factor(config.initializer_name, "outer", 0, config.num_layers)
        std = config.init_std * factor
        embedding = partial(
            Embedding, width=config.d_model, std=std, dtype=config.dtype, param_dtype=config.param_dtype
        )
        self.token_embedding = embedding(rows=config.vocab_size, scale=config.embedding_scale)
        if config.positions == "learned":
            self.position_embedding = embedding(rows=config.position_offset + present(config.max_positions))
        if config.has_embedding_norm:
            self.embedding_norm = stream_norm(config)
        if config.has_final_norm:
            self.final_norm = stream_norm(config)
        self.head = Head(
            config.vocab_size,
            std=std,
            use_bias=config.head_bias,
            param_dtype=config.param_dtype,
            scale=config.logit_scale,
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
        slots: Slots | None = None,
    ) -> Float[Array, "batch seq vocab"] | Float[Array, "batch seq embed"]:
        """Logits of the next token at every position.

        Args:
          positions: of each token in its document; 0, 1, ... by default.
          segment_ids: tokens attend to earlier tokens of the same id only.
          deterministic: False switches dropout on and needs a "dropout" key.
          return_hidden: return what the head reads (batch, seq, embed) in the compute dtype, and skip the head. In
            `init` that leaves the head's parameters out.
          slots: keep keys and values in the collection CACHE, and with a single token per sequence attend to those that
            are kept (cache.py). Positions must be given, and the model must be `unrolled`.
        """
        hidden = self.hidden(
            tokens, positions=positions, segment_ids=segment_ids, deterministic=deterministic, slots=slots
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
        slots: Slots | None = None,
    ) -> Stream:
        """What the head reads, in the compute dtype; arguments as in `__call__`."""
        config = self.config
        if slots is not None and not self.unrolled:
            raise ValueError("slots: a model with a loop over its layers keeps nothing; build it with unrolled=True")
        check_tokens(tokens)
        for name, array in (("positions", positions), ("segment_ids", segment_ids)):
            check_per_token(name, array, batch=tokens.shape[0], seq=tokens.shape[1])
        if positions is None:
            positions = default_positions(tokens.shape[1])
        stream = self.token_embedding(tokens)
        turn: Rotation | None = None
        if config.positions == "learned":
            if slots is None:  # whose padding has positions, too
                self._check_length(tokens.shape[1])
            stream = stream + self.position_embedding(positions + config.position_offset)
        else:
            turn = rotation(positions, config.rotary_width, config.rope_theta, config.dtype)
        if config.has_embedding_norm:
            stream = self.embedding_norm(stream)
        stream = nn.with_logical_constraint(self.dropout(stream, deterministic=deterministic), ("batch", "seq", None))
        stream = watch_stream(self, stream)

        keys = {name: self.make_rng(name) for name in KEYS if self.has_rng(name)}
        shared = SharedInputs(segment_ids=segment_ids, rotation=turn, slots=slots)
        for number, run in enumerate(config.runs):
            layers = layer_inputs(run, config.dtype, keys)
            if self.unrolled:
                stream = self._one_by_one(stream, run, layers, shared, deterministic)
            else:
                stream, _ = self._scanned(run, f"run_{number}", deterministic)(stream, layers, shared)
        return self.final_norm(stream) if config.has_final_norm else stream

    def logits(self, hidden: Stream) -> Float[Array, "batch seq vocab"]:
        """The head alone."""
        tied = self.token_embedding.embedding if self.config.tie_embeddings else None
        return nn.with_logical_constraint(self.head(hidden, tied), ("batch", "seq", "vocab"))

    def _one_by_one(
        self, stream: Stream, run: Run, layers: LayerInputs, shared: SharedInputs, deterministic: bool
    ) -> Stream:
        """The blocks of a run, each by itself."""
        block = partial(ScannedBlock, self.config, placement=run.structure, deterministic=deterministic)
        for place in range(run.length):
            layer = jax.tree.map(itemgetter(place), layers)
            stream, _ = block(name=f"layer_{run.start + place}")(stream, layer, shared)
        return stream

    def _scanned(self, run: Run, name: str, deterministic: bool) -> nn.Module:
        """The blocks of a run, one after the other: (stream, layer_inputs(run), SharedInputs) -> (stream, None)."""
        config = self.config
        block = ScannedBlock
        if config.remat not in ("none", AUTO_REMAT):
            # A loop keeps XLA from merging what is computed again with what was computed first; without one, a barrier.
            no_loop = config.scan_unroll >= run.length
            block = nn.remat(ScannedBlock, policy=REMAT_POLICIES[config.remat], prevent_cse=no_loop)
        scanned = nn.scan(
            block,
            variable_axes=dict.fromkeys(COLLECTIONS, 0),
            split_rngs=dict.fromkeys(KEYS, False),  # see ScannedBlock
            in_axes=(0, nn.broadcast),
            length=run.length,
            unroll=min(config.scan_unroll, run.length),
        )
        return scanned(config=config, placement=run.structure, deterministic=deterministic, name=name)

    def _check_length(self, length: int) -> None:
        largest = present(self.config.max_positions)
        if length > largest:
            raise ValueError(f"{length} tokens, but model.max_positions={largest}")


def layer_inputs(run: Run, dtype: str, keys: Mapping[str, Array]) -> LayerInputs:
    """The scanned inputs of a run: numbers of its layers, their scales, and their keys.

    A layer's keys depend on its number in the model and not on the run that it belongs to: so all schemes draw the same
    numbers for it.

    Args:
      dtype: of the stream; the scales are in float32 at least.
      keys: of the whole model, by the name of their stream.
    """
    wide = wide_dtype(dtype)

    def columns(scales: Scales[tuple[float, ...] | None]) -> Scales[Float[Array, " layers"] | None]:
        return Scales(residual=column(scales.residual), branch=column(scales.branch), input=column(scales.input))

    def column(values: tuple[float, ...] | None) -> Float[Array, " layers"] | None:
        return None if values is None else jnp.asarray(np.asarray(values), wide)

    layers = jnp.arange(run.start, run.start + run.length)
    return LayerInputs(
        layer=layers,
        attention=columns(run.scales("attention")),
        feed_forward=columns(run.scales("feed_forward")),
        keys={name: jax.vmap(partial(jax.random.fold_in, key))(layers) for name, key in keys.items()},
    )
