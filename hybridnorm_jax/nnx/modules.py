"""The NNX modules. Each is a thin shell: it holds parameters, and calls the Linen module of the same name with them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Float, Int

from hybridnorm_jax.kernels.head_preparation import Rotation
from hybridnorm_jax.model import attention, block, decoder, feed_forward, moe, norms
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.formula import Stream
from hybridnorm_jax.model.placement import BlockPlacement
from hybridnorm_jax.nnx.conversion import to_linen_params


class Shell(nnx.Module):
    """Parameters for a Linen module, and what applies it to them.

    The parameters are attributes of the same names and the same nesting as in the Linen tree, such as
    `decoder.run_0.attention.query.kernel`, each an nnx.Param. They start as `linen.init(rngs.params(), ...)` starts.

    Attributes:
      linen: the Linen module.
    """

    def __init__(self, linen: nn.Module, *, sample: Array, rngs: nnx.Rngs, initialized_as: nn.Module | None = None):
        """Draw the parameters.

        Args:
          linen: what is applied.
          sample: an input; only its shape and dtype matter, nothing is computed from it.
          rngs: has a stream "params", or a default.
          initialized_as: a module with the same parameters that runs on any device; None: `linen` does.
        """
        self.linen = linen
        initialize = (linen if initialized_as is None else initialized_as).init
        variables = jax.jit(initialize)(rngs.params(), sample)
        for name, tree in variables.get("params", {}).items():
            setattr(self, name, _parameters(tree))

    def _apply(self, x: Array, *, mutable: str | Sequence[str] = (), **inputs: Any) -> Any:
        names = [mutable] if isinstance(mutable, str) else list(mutable)
        collections = names if names else False
        return self.linen.apply({"params": to_linen_params(self)}, x, mutable=collections, **inputs)


class WithDropout(Shell):
    """A shell of a module that has dropout: on as a module starts and after train(), off after eval().

    Attributes:
      deterministic: whether dropout is off. train() and eval() set it, as for flax.nnx.Dropout.
    """

    def __init__(self, linen: nn.Module, *, sample: Array, rngs: nnx.Rngs, initialized_as: nn.Module):
        """Draw the parameters; arguments as in Shell."""
        super().__init__(linen, sample=sample, rngs=rngs, initialized_as=initialized_as)
        self.deterministic = False

    def _apply_with_dropout(self, x: Array, rate: float, rngs: nnx.Rngs | None, **inputs: Any) -> Any:
        if self.deterministic or rate == 0:
            return self._apply(x, deterministic=True, **inputs)
        if not isinstance(rngs, nnx.Rngs):
            right = "give the call rngs=nnx.Rngs(...), or switch dropout off with eval()"
            raise ValueError(f"rngs={rngs}: dropout={rate} is on and draws from them; {right}")
        return self._apply(x, deterministic=False, rngs={"dropout": rngs.dropout()}, **inputs)


def _parameters(tree: Any) -> Any:
    """The tree with every dict as nnx.Dict and every array as nnx.Param."""
    if isinstance(tree, Mapping):
        return nnx.Dict({name: _parameters(branch) for name, branch in tree.items()})
    return nnx.Param(tree)


def _stream_sample(width: int, dtype: Any) -> Stream:
    return jnp.zeros((1, 1, width), dtype)


def _for_any_device(config: ModelConfig) -> ModelConfig:
    """A model with the same parameters whose kernels every platform has."""
    return dataclasses.replace(config, attention="xla", expert_dispatch="dense")


class Norm(Shell):
    """A norm of hn.NORM_KINDS with a learned scale and bias, in the place of flax.nnx.LayerNorm or RMSNorm.

        norm = hn.nnx.Norm(512, kind="layernorm", rngs=nnx.Rngs(0))

    Parameters: `scale` and `bias` (num_features,), each where asked for, and those that the kind has besides.
    """

    def __init__(self, num_features: int, *, rngs: nnx.Rngs, **attributes: Any):
        """Draw the parameters.

        Args:
          num_features: size of the last axis, the one that scale and bias belong to.
          attributes: those of hn.Norm, such as kind and epsilon.
        """
        linen = norms.Norm(**attributes)
        if norms.as_axes(linen.feature_axes) != (-1,):
            raise ValueError(f"feature_axes={linen.feature_axes}: must be -1, the axis of size num_features")
        axes = norms.as_axes(linen.reduction_axes)
        # Of the smallest x that has these axes and a last one.
        rank = max([1, *(axis + 1 if axis >= 0 else -axis for axis in axes)])
        sample = jnp.zeros((num_features,)).reshape((1,) * (rank - 1) + (num_features,))
        super().__init__(linen, sample=sample, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The normalized array; see hn.Norm."""
        return self._apply(x)


class Attention(Shell):
    """Causal self-attention with norms on q, k, v and context, and RoPE; see hn.Attention.

        attention = hn.nnx.Attention(512, num_heads=8, q_norm="head", rope_theta=1e4, rngs=nnx.Rngs(0))

    Parameters: those of hn.Attention.
    """

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **attributes: Any):
        """Draw the parameters.

        Args:
          in_features: width of the stream.
          attributes: those of hn.Attention, such as num_heads.
        """
        linen = attention.Attention(**attributes)
        sample = _stream_sample(in_features, linen.dtype)
        super().__init__(linen, sample=sample, rngs=rngs, initialized_as=linen.clone(backend="xla"))

    def __call__(
        self,
        x: Stream,
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rotation: Rotation | None = None,
    ) -> Stream:
        """What attention adds to the stream; arguments as in hn.Attention."""
        return self._apply(x, positions=positions, segment_ids=segment_ids, rotation=rotation)


class FeedForward(Shell):
    """One hidden layer with an activation or a gate, such as SwiGLU; see hn.FeedForward.

        feed_forward = hn.nnx.FeedForward(512, mlp_dim=1376, rngs=nnx.Rngs(0))

    Parameters: those of hn.FeedForward.
    """

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **attributes: Any):
        """Draw the parameters.

        Args:
          in_features: width of the stream.
          attributes: those of hn.FeedForward, such as mlp_dim.
        """
        linen = feed_forward.FeedForward(**attributes)
        super().__init__(linen, sample=_stream_sample(in_features, linen.dtype), rngs=rngs)

    def __call__(self, x: Stream) -> Stream:
        """What the feed-forward layer adds to the stream."""
        return self._apply(x)


class MoE(Shell):
    """A mixture of experts that drops no token; see hn.MoE.

        moe = hn.nnx.MoE(512, num_experts=64, experts_per_token=8, mlp_dim=128, rngs=nnx.Rngs(0))
        y, sown = moe(x, mutable=["router"])
        sown["router"]["statistics"][0].balance_loss

    Parameters: those of hn.MoE. `balance_bias` has no gradient: where the layer has one, keep it from the optimizer.
    """

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **attributes: Any):
        """Draw the parameters.

        Args:
          in_features: width of the stream.
          attributes: those of hn.MoE, such as num_experts.
        """
        linen = moe.MoE(**attributes)
        sample = _stream_sample(in_features, linen.dtype)
        super().__init__(linen, sample=sample, rngs=rngs, initialized_as=linen.clone(dispatch="dense"))

    def __call__(self, x: Stream, *, mutable: str | Sequence[str] = ()) -> Any:
        """What the experts add to the stream.

        Args:
          mutable: collections to return, such as "router": the result is then (y, {collection: ...}).
        """
        return self._apply(x, mutable=mutable)


class Block(WithDropout):
    """One transformer block; see hn.Block.

        placement = hn.SCHEMES["span"].block(0, config.num_layers)
        block = hn.nnx.Block(config, placement, rngs=nnx.Rngs(0))

    Parameters: those of hn.Block.
    """

    def __init__(self, config: ModelConfig, placement: BlockPlacement, *, layer: int = 0, rngs: nnx.Rngs):
        """Draw the parameters; arguments as in hn.Block."""
        linen = block.Block(config=config, placement=placement, layer=layer)
        plain = linen.clone(config=_for_any_device(config))
        sample = _stream_sample(config.d_model, config.dtype)
        super().__init__(linen, sample=sample, rngs=rngs, initialized_as=plain)

    def __call__(
        self,
        x: Stream,
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        rotation: Rotation | None = None,
        rngs: nnx.Rngs | None = None,
        mutable: str | Sequence[str] = (),
    ) -> Any:
        """The stream after this block; arguments as in hn.Block.

        Args:
          rngs: what dropout draws from: its stream "dropout", or its default. Needed only where dropout is on.
          mutable: collections to return, such as "router": the result is then (y, {collection: ...}).
        """
        return self._apply_with_dropout(
            x,
            self.linen.config.dropout,
            rngs,
            positions=positions,
            segment_ids=segment_ids,
            rotation=rotation,
            mutable=mutable,
        )


class Decoder(WithDropout):
    """A causal language model whose norms stand where config.scheme says; see hn.Decoder.

        model = hn.nnx.Decoder(config, rngs=nnx.Rngs(0))
        logits = model(tokens)

    Parameters: those of hn.Decoder, see docs/parameters.md.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draw the parameters; arguments as in hn.Decoder."""
        plain = decoder.Decoder(config=_for_any_device(config))
        tokens = jnp.zeros((1, 1), jnp.int32)
        super().__init__(decoder.Decoder(config=config), sample=tokens, rngs=rngs, initialized_as=plain)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        return_hidden: bool = False,
        step: Int[Array, ""] | int | None = None,
        rngs: nnx.Rngs | None = None,
        mutable: str | Sequence[str] = (),
    ) -> Any:
        """Logits of the next token at every position; arguments as in hn.Decoder.

        Args:
          return_hidden: return what the head reads, and skip the head.
          step: of training, where branches of the scheme grow with it.
          rngs: what dropout draws from: its stream "dropout", or its default. Needed only where dropout is on.
          mutable: collections to return, such as "router": the result is then (y, {collection: ...}).
        """
        return self._apply_with_dropout(
            tokens,
            self.linen.config.dropout,
            rngs,
            positions=positions,
            segment_ids=segment_ids,
            return_hidden=return_hidden,
            step=step,
            mutable=mutable,
        )
