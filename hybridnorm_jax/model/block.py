"""One transformer block: the formula, applied to attention and to the feed-forward layer as the placement says."""

from collections.abc import Callable
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.kernels.head_preparation import Rotation
from hybridnorm_jax.kernels.precision import wide_dtype, widened
from hybridnorm_jax.kernels.swiglu import SwigluClamp
from hybridnorm_jax.model.alibi import alibi_of
from hybridnorm_jax.model.attention import Attention
from hybridnorm_jax.model.cache import Slots
from hybridnorm_jax.model.config import ModelConfig, NormPlace
from hybridnorm_jax.model.feed_forward import FeedForward
from hybridnorm_jax.model.initializers import std_factor, truncated_normal
from hybridnorm_jax.model.input_checks import check_per_token
from hybridnorm_jax.model.layer_scale import LayerScale
from hybridnorm_jax.model.moe import MoE
from hybridnorm_jax.model.norm_functions import padding_defect, zero_mean_defect
from hybridnorm_jax.model.norms import Norm
from hybridnorm_jax.model.placement import BlockPlacement, Scales, SublayerName, SublayerPlacement
from hybridnorm_jax.model.rotation import default_positions, rotations
from hybridnorm_jax.model.signal_measures import PROBE, SIGNAL, gradient_probe, stream_rms, token_similarity

Stream = Float[Array, "batch seq embed"]
StreamFunction = Callable[[Stream], Stream]
ScaleArrays = Scales[Float[Array, ""] | None]  # None where the scale is 1

# Collections that Block and Decoder fill where an invariant check makes them mutable; nothing is computed otherwise.
# So it is with SIGNAL and PROBE, of signal_measures.py.
STREAM, DEFECT = "stream", "stream_defect"


class SublayerNorms(NamedTuple):
    """The norms of the formula, each the identity where the placement has none.

    Behind the branch norm stands LayerScale, where the model has it.
    """

    pre: StreamFunction
    branch: StreamFunction
    post: StreamFunction


def apply_formula(
    f: StreamFunction,
    sublayer_input: Stream,
    block_input: Stream,
    placement: SublayerPlacement,
    norms: SublayerNorms,
    scales: ScaleArrays,
) -> Stream:
    """y = post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x)))): every sublayer of every scheme."""
    pre, branch, post = norms
    residual_scale, branch_scale, input_scale = scales

    x = block_input if placement.reads == "block" else sublayer_input
    match placement.residual:
        case "input":
            r = sublayer_input
        case "block":
            r = block_input
        case "both":
            r = sublayer_input + block_input
    return post(times(residual_scale, r) + times(branch_scale, branch(f(times(input_scale, pre(x))))))


def times(scale: Float[Array, ""] | None, x: Array) -> Array:
    """scale * x, multiplied in float32 at least and rounded once to the dtype of x; a scale of None is 1."""
    return x if scale is None else (scale.astype(wide_dtype(x.dtype)) * widened(x)).astype(x.dtype)


def scale_arrays(scales: Scales[float], dtype: str) -> ScaleArrays:
    """The scales of one layer for a stream of this dtype, in float32 at least; None where a scale is 1."""

    def array(scale: float) -> Float[Array, ""] | None:
        return None if scale == 1.0 else jnp.asarray(scale, wide_dtype(dtype))

    return Scales(residual=array(scales.residual), branch=array(scales.branch), input=array(scales.input))


@flax.struct.dataclass
class LayerInputs:
    """What differs between the layers of a run; scanned over.

    Attributes:
      layer: number of the layer, from 0.
      attention, feed_forward: the scales of the formula in the two sublayers.
      keys: what the layer draws its parameters and its dropout from, by the name of Flax's stream. The Decoder gives
        them; a Block alone leaves keys to Flax.
      window: how many positions a token sees, where the layers of the run differ in that; None: Block.window says it.
      rotation: which of the rotations of SharedInputs.rotation, where the layers of the run differ in that; None: there
        is one, or none.
    """

    layer: int | Int[Array, ""]
    attention: ScaleArrays
    feed_forward: ScaleArrays
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
    `attention_branch_norm`, `attention_post_norm`, `feed_forward_pre_norm`, ... with `scale` and `bias` (embed,); with
    config.layer_scale `attention_layer_scale/scale` and `feed_forward_layer_scale/scale` (embed,). Where the placement
    has one pre norm for both branches, it is `attention_pre_norm`.

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
        x: Stream,
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rotation: Rotation | None = None,
        deterministic: bool = True,
    ) -> Stream:
        """The stream after this block, in the dtype of x.

        Args:
          x: the stream before it, in the compute dtype.
          positions: of each token in its document, for RoPE; 0, 1, ... by default.
          segment_ids: tokens attend to earlier tokens of the same id only.
          rotation: what hn.rotation(positions, ...) gives, where many blocks share it; takes the place of positions.
          deterministic: False switches dropout on and needs a "dropout" key.
        """
        if not 0 <= self.layer < self.config.num_layers:
            right = f"must be in [0, num_layers={self.config.num_layers})"
            raise ValueError(f"layer={self.layer}: {right}")
        layer = LayerInputs(
            layer=self.layer,
            attention=scale_arrays(self.placement.attention.scales, self.config.dtype),
            feed_forward=scale_arrays(self.placement.feed_forward.scales, self.config.dtype),
        )
        if rotation is not None and positions is not None:
            raise ValueError("positions: they are in the rotation already; give one of the two")
        if rotation is None and self.config.positions == "rope":
            positions = default_positions(x.shape[1]) if positions is None else positions
            check_per_token("positions", positions, batch=x.shape[0], seq=x.shape[1])
            kind = self.config.layer_rotations[self.layer]
            rotation, positions = rotations(self.config, positions, self.config.dtype).get(kind), None
        shared = SharedInputs(positions=positions, segment_ids=segment_ids, rotation=rotation)
        return self.transform(x, layer, shared, deterministic=deterministic)

    @nn.compact
    def transform(self, x: Stream, layer: LayerInputs, shared: SharedInputs, *, deterministic: bool) -> Stream:
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

        attention_norms = self._norms("attention", self.placement.attention)
        shared_pre = attention_norms.pre if self.placement.shared_pre_norm else None
        after_attention = apply_formula(
            self._with_dropout(attend, deterministic, "attention_dropout"),
            sublayer_input=x,
            block_input=x,
            placement=self.placement.attention,
            norms=attention_norms,
            scales=layer.attention,
        )
        y = apply_formula(
            self._with_dropout(feed_forward, deterministic, "feed_forward_dropout"),
            sublayer_input=after_attention,
            block_input=x,
            placement=self.placement.feed_forward,
            norms=self._norms("feed_forward", self.placement.feed_forward, shared_pre),
            scales=layer.feed_forward,
        )
        return nn.with_logical_constraint(watch_stream(self, y), ("batch", "seq", None))

    def _with_dropout(self, f: StreamFunction, deterministic: bool, name: str) -> StreamFunction:
        dropout = Dropout(self.config.dropout, deterministic=deterministic, name=name)
        return lambda x: dropout(f(x))

    def _norms(
        self, sublayer: SublayerName, placement: SublayerPlacement, shared_pre: StreamFunction | None = None
    ) -> SublayerNorms:
        """The norms of a sublayer; `shared_pre` is the pre norm of another one that it uses."""

        def norm(present: bool, which: str, initial_scale: float = 1.0) -> StreamFunction:
            if not present:
                return lambda x: x
            scale_init = nn.initializers.constant(initial_scale)
            return stream_norm(self.config, place=sublayer, name=f"{sublayer}_{which}_norm", scale_init=scale_init)

        return SublayerNorms(
            pre=norm(placement.pre, "pre") if shared_pre is None else shared_pre,
            branch=self._scaled(norm(placement.branch, "branch", placement.branch_norm_init), sublayer),
            post=norm(placement.post, "post"),
        )

    def _scaled(self, branch_norm: StreamFunction, sublayer: str) -> StreamFunction:
        """The branch norm and what stands behind it."""
        if not self.config.layer_scale:
            return branch_norm
        scale = LayerScale(jnp.dtype(self.config.param_dtype), name=f"{sublayer}_layer_scale")
        return lambda x: scale(branch_norm(x))

    @property
    def window(self) -> int:
        """How many positions a token sees; 0: all."""
        return self.config.layer_windows[self.layer]

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward layer is one of experts."""
        return self.config.has_experts[self.layer]

    def _initializer(self, role: str, layer: int | Int[Array, ""]) -> Callable[..., Array]:
        factor = std_factor(self.config.initializer_name, role, layer, self.config.num_layers)
        return truncated_normal(self.config.init_std * factor)

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

    def _feed_forward(self, layer: int | Int[Array, ""]) -> FeedForward | MoE:
        config = self.config
        clamp = SwigluClamp(limit=config.clamp_limit, alpha=config.clamp_alpha)
        if not self.has_experts:
            return FeedForward(
                mlp_dim=config.dense_width,
                activation=config.activation,
                use_bias=config.mlp_bias,
                use_output_bias=config.mlp_output_bias,
                clamp=clamp,
                dtype=jnp.dtype(config.dtype),
                param_dtype=jnp.dtype(config.param_dtype),
                input_init=self._initializer("feed_forward", layer),
                output_init=self._initializer("output", layer),
                name="feed_forward",
            )
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
            router_init=self._initializer("input", layer),
            input_init=self._initializer("feed_forward", layer),
            output_init=self._initializer("output", layer),
            name="feed_forward",
        )


def watch_stream(module: nn.Module, stream: Stream) -> Stream:
    """Sow what is wanted of the stream, and return the stream.

    Of the collections that are mutable, STREAM gets the stream, DEFECT its zero_mean_defect (with norm_width its
    padding_defect), and SIGNAL what signal_measures says of it. Where PROBE has a place for it, the gradient of the
    stream that is returned is measured.

    Args:
      module: a Block or the Decoder; it has a `config`.
    """
    if module.is_initializing():  # where every collection is
        return stream
    if module.is_mutable_collection(STREAM):
        module.sow(STREAM, "value", stream)
    if module.is_mutable_collection(DEFECT):
        width = module.config.norm_width
        defect = zero_mean_defect(stream) if width is None else padding_defect(stream, width)
        module.sow(DEFECT, "value", defect)
    if module.is_mutable_collection(SIGNAL):
        module.sow(SIGNAL, "stream_rms", stream_rms(stream))
        module.sow(SIGNAL, "token_similarity", token_similarity(stream))
    if module.has_variable(PROBE, "square"):
        stream = gradient_probe(stream, module.get_variable(PROBE, "square"))
    return stream


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
