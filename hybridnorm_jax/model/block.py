"""One transformer block: the formula, applied to attention and to the feed-forward layer as the placement says."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.kernels.head_preparation import Rotation
from hybridnorm_jax.kernels.precision import widened
from hybridnorm_jax.kernels.swiglu import SwigluClamp
from hybridnorm_jax.model.alibi import alibi_of
from hybridnorm_jax.model.attention import Attention
from hybridnorm_jax.model.cache import Slots
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.config_norms import NormPlace
from hybridnorm_jax.model.feed_forward import FeedForward
from hybridnorm_jax.model.formula import (
    ALL_ONE,
    ScaleArrays,
    StartArrays,
    Stream,
    StreamFunction,
    Streams,
    SublayerNorms,
    apply_formula,
    scale_arrays,
    start_arrays,
    starting_at,
    times,
    unchanged,
)
from hybridnorm_jax.model.initializers import matrix_init, std_factor
from hybridnorm_jax.model.input_checks import check_per_token
from hybridnorm_jax.model.layer_scale import LayerScale, StoredScale
from hybridnorm_jax.model.norms import Norm
from hybridnorm_jax.model.placement import BlockPlacement, SublayerName, SublayerPlacement
from hybridnorm_jax.model.rotation import default_positions, rotations
from hybridnorm_jax.model.watched_streams import constrained, watch_streams
from hybridnorm_jax.model.width_scaling import Kind, std_for_width

if TYPE_CHECKING:
    from hybridnorm_jax.model.moe import MoE

# How far along the chord a block of nGPT goes at first: its eigen learning rates (2410.01131, section 2.6).
CHORD_START = 0.05


@flax.struct.dataclass
class LayerInputs:
    """What differs between the layers of a run; scanned over.

    Attributes:
      layer: number of the layer, from 0.
      attention, feed_forward: the scales of the formula in the two sublayers.
      attention_starts, feed_forward_starts: where their learned scales start; read at initialization alone.
      keys: what the layer draws its parameters and its dropout from, by the name of Flax's stream. The Decoder gives
        them; a Block alone leaves keys to Flax.
      window: how many positions a token sees, where the layers of the run differ in that; None: Block.window says it.
      rotation: which of the rotations of SharedInputs.rotation, where the layers of the run differ in that; None: there
        is one, or none.
    """

    layer: int | Int[Array, ""]
    attention: ScaleArrays
    feed_forward: ScaleArrays
    attention_starts: StartArrays = ALL_ONE
    feed_forward_starts: StartArrays = ALL_ONE
    keys: dict[str, Array] = flax.struct.field(default_factory=dict)
    window: Int[Array, ""] | None = None
    rotation: Int[Array, ""] | None = None


@flax.struct.dataclass
class SharedInputs:
    """What is the same for all layers; see the arguments of Attention. `slots` are those of the cache, if any.

    Attributes:
      rotation: of the layers of one run; several on a first axis where they differ.
      rotations: those of a whole model, by kind, see model/rotation.py; a run takes its own out of them.
    """

    rotation: Rotation | None = None
    rotations: dict[int, Rotation] = flax.struct.field(default_factory=dict)
    segment_ids: Int[Array, "batch seq"] | None = None
    positions: Int[Array, "batch seq"] | None = None
    slots: Slots | None = None


class Dropout(nn.Dropout):
    """flax.linen.Dropout that divides by the keep probability in float32 at least, and rounds once."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """x / (1 - rate) where it is kept, and 0 elsewhere, in the dtype of x; arguments as in flax.linen.Dropout."""
        dropped: Array = super().__call__(widened(x), deterministic=deterministic, rng=rng)
        return dropped.astype(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each as post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x)))).

        block = hn.Block(config=config, placement=hn.SCHEMES["span"].block(0, config.num_layers))
        variables = block.init(key, x)
        y = block.apply(variables, x)

    Parameters: `attention/...`, `feed_forward/...`, and of the norms that the placement has `attention_pre_norm`,
    `attention_branch_norm`, `attention_post_norm`, `feed_forward_pre_norm`, ... with `scale` and `bias` (embed,). The
    learned scales that it has are `attention_layer_scale/scale` and `feed_forward_layer_scale/scale`, (embed,) or (1,),
    and `attention_residual_vector/scale` and `feed_forward_residual_vector/scale` (embed,). config.layer_scale is
    layer_scale="channel" in both sublayers. What both branches share has the name of attention's. With a side stream
    there are `attention_side_norm`, and `attention_own_norm` or `attention_own_vector`, and so of feed_forward.

    Attributes:
      config: sizes, kinds and dtypes; its scheme does not matter here, except for initializer=auto.
      placement: where this block normalizes, and its scales.
      layer: number of the block in its model, from 0: it decides the block's window and rotation and whether it has
        experts, where layers differ in them, and the initializer "depth_scaled" asks for it.
    """

    config: ModelConfig
    placement: BlockPlacement
    layer: int = 0

    def __call__(
        self,
        x: Stream | Streams,
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rotation: Rotation | None = None,
        deterministic: bool = True,
    ) -> Stream | Streams:
        """The stream after this block, in the dtype of x; Streams where it has two.

        Args:
          x: the stream before it, in the compute dtype; hn.Streams(main, side) where the placement has a side stream.
          positions: of each token in its document, for RoPE; 0, 1, ... by default.
          segment_ids: tokens attend to earlier tokens of the same id only.
          rotation: what hn.rotation(positions, ...) gives, where many blocks share it; takes the place of positions.
          deterministic: False switches dropout on and needs a "dropout" key.
        """
        if not 0 <= self.layer < self.config.num_layers:
            right = f"must be in [0, num_layers={self.config.num_layers})"
            raise ValueError(f"layer={self.layer}: {right}")
        if self.placement.grows:
            right = "give a placement at a step: config.at_step(step).placements[layer]"
            raise ValueError(f"placement: its branches grow with the training step, which no block knows; {right}")
        layer = LayerInputs(
            layer=self.layer,
            attention=scale_arrays(self.placement.attention.scales, self.config.dtype),
            feed_forward=scale_arrays(self.placement.feed_forward.scales, self.config.dtype),
            attention_starts=start_arrays(self.placement.attention.starts, self.config.param_dtype),
            feed_forward_starts=start_arrays(self.placement.feed_forward.starts, self.config.param_dtype),
        )
        streams = x if isinstance(x, Streams) else Streams(main=x)
        if (streams.side is not None) != self.placement.has_side_stream:
            right = "hn.Streams(main, side)" if self.placement.has_side_stream else "one array"
            raise ValueError(f"x: the placement of this block needs {right}")
        seq, batch = streams.main.shape[1], streams.main.shape[0]
        if rotation is not None and positions is not None:
            raise ValueError("positions: they are in the rotation already; give one of the two")
        if rotation is None and self.config.positions == "rope":
            positions = default_positions(seq) if positions is None else positions
            check_per_token("positions", positions, batch=batch, seq=seq)
            kind = self.config.layer_rotations[self.layer]
            rotation, positions = rotations(self.config, positions, self.config.dtype).get(kind), None
        shared = SharedInputs(positions=positions, segment_ids=segment_ids, rotation=rotation)
        after = self.transform(streams, layer, shared, deterministic=deterministic)
        return after if self.placement.has_side_stream else after.main

    @nn.compact
    def transform(self, before: Streams, layer: LayerInputs, shared: SharedInputs, *, deterministic: bool) -> Streams:
        """`__call__` with the layer's number and scales as inputs: so one traced block serves a scan over layers."""
        attention, feed_forward = self._attention(layer.layer), self._feed_forward(layer.layer)

        by = shared.rotation
        if layer.rotation is not None:
            by = jax.tree.map(lambda stacked: stacked[layer.rotation], by)

        def attend(x: Stream) -> Stream:
            return attention(
                x,
                positions=shared.positions,
                segment_ids=shared.segment_ids,
                rotation=by,
                layer_window=layer.window,
                slots=shared.slots,
            )

        parts = self.placement.attention, self.placement.feed_forward
        attention_scale = self._layer_scale("attention", parts[0], layer.attention_starts)
        feed_forward_scale = attention_scale
        if not self.placement.shared_layer_scale:
            feed_forward_scale = self._layer_scale("feed_forward", parts[1], layer.feed_forward_starts)
        attention_norms = self._norms("attention", parts[0], layer.attention_starts, attention_scale)
        feed_forward_norms = self._norms("feed_forward", parts[1], layer.feed_forward_starts, feed_forward_scale)
        if self.placement.shared_pre_norm:
            feed_forward_norms = feed_forward_norms._replace(pre=attention_norms.pre)
        after_attention = apply_formula(
            self._with_dropout(attend, deterministic, "attention_dropout"),
            sublayer_input=before,
            block_input=before.main,
            placement=self.placement.attention,
            norms=attention_norms,
            scales=layer.attention,
        )
        after = apply_formula(
            self._with_dropout(feed_forward, deterministic, "feed_forward_dropout"),
            sublayer_input=after_attention,
            block_input=before.main,
            placement=self.placement.feed_forward,
            norms=feed_forward_norms,
            scales=layer.feed_forward,
        )
        return constrained(watch_streams(self, after))

    def _with_dropout(self, f: StreamFunction, deterministic: bool, name: str) -> StreamFunction:
        dropout = Dropout(self.config.dropout, deterministic=deterministic, name=name)
        return lambda x: dropout(f(x))

    def _norms(
        self, sublayer: SublayerName, placement: SublayerPlacement, starts: StartArrays, layer_scale: StreamFunction
    ) -> SublayerNorms:
        """The norms of a sublayer, and its learned scales, of which one exists already."""

        def norm(present: bool, which: str, start: Float[Array, ""] | None = None) -> StreamFunction:
            if not present:
                return unchanged
            name, scale_init = f"{sublayer}_{which}_norm", starting_at(start)
            return stream_norm(self.config, place=sublayer, name=name, scale_init=scale_init)

        residual: StreamFunction = unchanged
        if placement.residual_vector:
            residual = LayerScale(jnp.dtype(self.config.param_dtype), name=f"{sublayer}_residual_vector")
        own = norm(placement.side_own == "norm", "own")
        if placement.side_own == "vector":
            own = LayerScale(jnp.dtype(self.config.param_dtype), name=f"{sublayer}_own_vector")
        return SublayerNorms(
            entry=norm(placement.entry, "entry"),
            side=norm(placement.side == "read", "side"),
            own=own,
            pre=norm(placement.pre, "pre", starts.pre),
            branch=norm(placement.branch, "branch", starts.branch),
            layer_scale=layer_scale,
            post=norm(placement.post, "post"),
            residual=residual,
        )

    def _layer_scale(self, sublayer: SublayerName, placement: SublayerPlacement, starts: StartArrays) -> StreamFunction:
        """The learned scale behind a branch."""
        kind = self.config.layer_scale_of(placement)
        if kind is None:
            return unchanged
        dtype, name = jnp.dtype(self.config.param_dtype), f"{sublayer}_layer_scale"
        if placement.joins == "chord":
            stored = StoredScale(CHORD_START, 1 / math.sqrt(self.config.d_model), dtype, name=name)
            return lambda x: times(jnp.abs(stored(x.shape[-1])), x)
        return LayerScale(dtype, is_scalar=kind == "scalar", scale_init=starting_at(starts.layer_scale), name=name)

    @property
    def window(self) -> int:
        """How many positions a token sees; 0: all."""
        return self.config.layer_windows[self.layer]

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward layer is one of experts."""
        return self.config.has_experts[self.layer]

    def _initializer(self, role: str, layer: int | Int[Array, ""], kind: Kind = "hidden") -> Callable[..., Array]:
        factor = std_factor(self.config.initializer_name, role, layer, self.config.num_layers)
        std = self.config.init_std * std_for_width(kind, self.config.width_ratio) * factor
        return matrix_init(self.config.initializer_name, std, writes=role == "output")

    def _attention(self, layer: int | Int[Array, ""]) -> Attention:
        config, placement = self.config, self.placement
        return Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            q_norm=placement.q_norm,
            k_norm=placement.k_norm,
            v_norm=placement.v_norm,
            context_norm=placement.context_norm,
            head_scales=placement.head_scales,
            sphere=placement.sphere,
            norm=config.attention_norm_kind,
            norm_starts=config.norm_starts("attention", config.attention_norm_kind),
            norm_epsilon=config.norm_eps,
            norm_scale=config.attention_norm_scale,
            norm_bias=config.attention_norm_bias,
            norm_scale_plus_one=config.norm_scale_plus_one,
            alibi=alibi_of(config),
            norm_per_head=config.attention_norm_per_head,
            score_scale=config.attention_scale,
            score_cap=config.score_cap,
            qkv_clip=config.qkv_clip,
            window=self.window or None,
            causal=config.is_causal,
            use_sinks=config.attention_sinks,
            use_bias=config.attention_bias,
            use_output_bias=config.attention_output_bias,
            backend=config.attention,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            input_init=self._initializer("input", layer),
            value_init=self._initializer("value", layer),
            output_init=self._initializer("output", layer),
            name="attention",
        )

    def _feed_forward(self, layer: int | Int[Array, ""]) -> "FeedForward | MoE":
        config = self.config
        clamp = SwigluClamp(limit=config.clamp_limit, alpha=config.clamp_alpha)
        if not self.has_experts:
            return FeedForward(
                mlp_dim=config.dense_width,
                activation=config.activation,
                use_bias=config.mlp_bias,
                use_output_bias=config.mlp_output_bias,
                clamp=clamp,
                gate_norm=self.placement.gate_norm and config.is_gated,
                up_norm=self.placement.up_norm,
                hidden_norm=self.placement.hidden_norm,
                sphere=self.placement.sphere,
                norm=config.attention_norm_kind,
                norm_starts=config.norm_starts("feed_forward", config.attention_norm_kind),
                norm_epsilon=config.norm_eps,
                norm_scale=config.attention_norm_scale,
                norm_bias=config.attention_norm_bias,
                norm_scale_plus_one=config.norm_scale_plus_one,
                dtype=jnp.dtype(config.dtype),
                param_dtype=jnp.dtype(config.param_dtype),
                input_init=self._initializer("feed_forward", layer),
                up_init=self._initializer("up", layer),
                output_init=self._initializer("output", layer),
                name="feed_forward",
            )
        # A sixth of the time that the library takes to import, for models that most programs do not have.
        from hybridnorm_jax.model.moe import MoE

        return MoE(
            num_experts=config.num_experts,
            experts_per_token=present(config.experts_per_token),
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            clamp=clamp,
            normalize_weights=config.normalize_expert_weights,
            shared_experts=config.shared_experts,
            shared_mlp_dim=config.shared_mlp_dim,
            shared_gate=config.shared_expert_gate,
            shared_gate_bias=config.shared_expert_gate_bias,
            balance_bias=config.balance_bias,
            use_bias=config.mlp_bias,
            use_output_bias=config.mlp_output_bias,
            use_router_bias=config.router_bias,
            dispatch=config.expert_dispatch,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            router_init=self._initializer("input", layer, "output"),
            input_init=self._initializer("feed_forward", layer),
            up_init=self._initializer("up", layer),
            output_init=self._initializer("output", layer),
            name="feed_forward",
        )


def stream_norm(
    config: ModelConfig,
    *,
    place: NormPlace = "attention",
    name: str | None = None,
    scale_init: Callable[..., Array] = nn.initializers.ones,
) -> Norm:
    """A norm on the residual stream, with the model's kind, width, epsilon, affine parameters and dtypes.

    Args:
      place: where it stands, which may decide what its parameters start at.
    """
    return Norm(
        kind=config.norm,
        epsilon=config.norm_eps,
        use_scale=config.norm_scale,
        use_bias=config.norm_bias,
        scale_plus_one=config.norm_scale_plus_one,
        scale_init=scale_init,
        starts=config.norm_starts(place, config.norm),
        width=config.norm_width,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        name=name,
    )
