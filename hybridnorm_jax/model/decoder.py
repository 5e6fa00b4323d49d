"""The language model: embedding, runs of blocks under nn.scan, head.

The parameter tree is plain nested dicts of arrays:

    token_embedding/embedding                    (vocab, embed)
    position_embedding/embedding                 (positions, embed)        positions="learned" only, see position_offset
    embedding_norm/{scale, bias}                 (embed,)                  where the scheme has one
    run_<i>/attention/{query, key, value}/kernel (layers, embed, heads or kv_heads, head_dim)
    run_<i>/attention/out/kernel                 (layers, heads, head_dim, embed)
    run_<i>/attention/{q_norm, k_norm, v_norm, context_norm}/scale   (layers, head_dim or heads * head_dim)
    run_<i>/feed_forward/{gate, up}/kernel       (layers, embed, mlp)      gate for swiglu only
    run_<i>/feed_forward/down/kernel             (layers, mlp, embed)
    of a mixture of experts instead:
    run_<i>/feed_forward/router/kernel           (layers, embed, experts)
    run_<i>/feed_forward/expert_{gate, up}/kernel (layers, experts, embed, mlp)
    run_<i>/feed_forward/expert_down/kernel      (layers, experts, mlp, embed)
    run_<i>/feed_forward/balance_bias            (layers, experts)         where the model has one
    run_<i>/feed_forward/shared/{gate, up, down}/kernel                    as a dense layer's, of the shared experts
    run_<i>/{attention, feed_forward}_{pre, branch, post}_norm/scale (layers, embed)
    final_norm/{scale, bias}                     (embed,)                  where the scheme has one
    head/kernel                                  (embed, vocab)            untied only
    head/bias                                    (vocab,)                  where the model has one

Run i holds `layers` consecutive layers of one structure (placement.runs), first to last; biases stand beside their
kernels, without the kernel's input axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.names import SAVED
from hybridnorm_jax.model.attention import rotation
from hybridnorm_jax.model.block import DEFECT, STREAM, Block, LayerInputs, SharedInputs, stream_norm, watch_stream
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.initializers import std_factor, truncated_normal
from hybridnorm_jax.model.moe import CHOSEN, ROUTER
from hybridnorm_jax.model.placement import Run, runs
from hybridnorm_jax.model.signal_measures import PROBE, SIGNAL

_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)
# Of every layer its own.
COLLECTIONS = ("params", "intermediates", STREAM, DEFECT, ROUTER, CHOSEN, SIGNAL, PROBE)
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "all_but_attention": _ATTENTION,
    # With attention's result kept, the scores it came from, which are products too, need not be.
    "dots": jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.checkpoint_dots, _ATTENTION),
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


class Embedding(nn.Module):
    """Rows of a learned table.

    Parameters: `embedding` (rows, embed).
    """

    rows: int
    width: int
    std: float
    dtype: str
    param_dtype: str

    def setup(self):
        init = truncated_normal(self.std)
        self.embedding = self.param("embedding", init, (self.rows, self.width), jnp.dtype(self.param_dtype))

    def __call__(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        """Look the rows up; an id beyond the table gives NaN. The gradient is summed in the parameters' dtype."""
        # Gathered along embed before the lookup: XLA cannot get from a result sharded by embed to one sharded by batch.
        table = nn.with_logical_constraint(self.embedding, ("vocab", None))
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class Head(nn.Module):
    """hidden @ kernel + bias, in float32 at least.

    Parameters: `kernel` (embed, vocab), none where the head is tied; `bias` (vocab,) where asked for.
    """

    vocab_size: int
    std: float
    use_bias: bool
    param_dtype: str

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch seq embed"], tied: Float[Array, "vocab embed"] | None = None
    ) -> Float[Array, "batch seq vocab"]:
        """`tied`: the token embedding, where it is also the head."""
        accumulate, dtype = jnp.promote_types(hidden.dtype, jnp.float32), jnp.dtype(self.param_dtype)
        if tied is not None:
            logits = jnp.einsum("bse,ve->bsv", hidden, tied.astype(hidden.dtype), preferred_element_type=accumulate)
        else:
            shape = (hidden.shape[-1], self.vocab_size)
            kernel = self.param("kernel", truncated_normal(self.std), shape, dtype).astype(hidden.dtype)
            logits = jnp.einsum("bse,ev->bsv", hidden, kernel, preferred_element_type=accumulate)
        if not self.use_bias:
            return logits
        return logits + self.param("bias", nn.initializers.zeros, (self.vocab_size,), dtype).astype(accumulate)


class Decoder(nn.Module):
    """A causal language model whose norms stand where config.scheme says.

    `Decoder(config).init(key, tokens)["params"]` is the tree described at the top of this file;
    `.apply({"params": params}, tokens)` gives logits (batch, seq, vocab), float32 or wider.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        factor = std_factor(config.initializer_name, "outer", 0, config.num_layers)
        table = {"std": config.init_std * factor, "param_dtype": config.param_dtype}
        self.token_embedding = Embedding(config.vocab_size, config.d_model, dtype=config.dtype, **table)
        if config.positions == "learned":
            rows = config.position_offset + config.max_positions
            self.position_embedding = Embedding(rows, config.d_model, dtype=config.dtype, **table)
        if config.has_embedding_norm:
            self.embedding_norm = stream_norm(config)
        if config.has_final_norm:
            self.final_norm = stream_norm(config)
        self.head = Head(config.vocab_size, use_bias=config.head_bias, **table)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, tokens: Int[Array, "batch seq"], **inputs) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token at every position; `inputs` are those of `hidden`."""
        return self.logits(self.hidden(tokens, **inputs))

    @nn.compact
    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch seq embed"]:
        """What the head reads, in the compute dtype.

        Args:
          positions: of each token in its document; 0, 1, ... by default.
          segment_ids: tokens attend to earlier tokens of the same id only.
          deterministic: False switches dropout on and needs a "dropout" key.
        """
        config = self.config
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        stream = self.token_embedding(tokens)
        by = None
        if config.positions == "learned":
            self._check_length(tokens.shape[1])
            stream = stream + self.position_embedding(positions + config.position_offset)
        else:
            by = rotation(positions, config.rotary_dim, config.rope_theta, config.dtype)
        if config.has_embedding_norm:
            stream = self.embedding_norm(stream)
        stream = nn.with_logical_constraint(self.dropout(stream, deterministic=deterministic), ("batch", "seq", None))
        stream = watch_stream(self, stream)

        shared = SharedInputs(by, segment_ids)
        for number, run in enumerate(runs(config.placements)):
            scanned = self._scanned(run, f"run_{number}", deterministic)
            stream, _ = scanned(stream, layer_inputs(run, config.dtype), shared)
        return self.final_norm(stream) if config.has_final_norm else stream

    def logits(self, hidden: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        """The head alone."""
        tied = self.token_embedding.embedding if self.config.tie_embeddings else None
        return nn.with_logical_constraint(self.head(hidden, tied), ("batch", "seq", "vocab"))

    def _scanned(self, run: Run, name: str, deterministic: bool) -> nn.Module:
        config = self.config
        block = Block
        if config.remat != "none":
            # A loop keeps XLA from merging what is computed again with what was computed first; without one, a barrier.
            no_loop = config.scan_unroll >= run.length
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=no_loop)
        scanned = nn.scan(
            block,
            variable_axes=dict.fromkeys(COLLECTIONS, 0),
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=run.length,
            unroll=min(config.scan_unroll, run.length),
        )
        return scanned(config, run.structure, deterministic=deterministic, name=name)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_positions:
            raise ValueError(f"{length} tokens, but model.max_positions={self.config.max_positions}")


def layer_inputs(run: Run, dtype: str) -> LayerInputs:
    """The scanned inputs of a run: numbers of its layers and their scales, in the stream's dtype."""

    def column(values):
        return None if values is None else jnp.asarray(np.asarray(values), dtype)

    return LayerInputs(
        layer=jnp.arange(run.start, run.start + run.length),
        attention=tuple(map(column, run.scales("attention"))),
        feed_forward=tuple(map(column, run.scales("feed_forward"))),
    )
