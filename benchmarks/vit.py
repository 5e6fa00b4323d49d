"""A ViT whose norms are this library's, its residual layout, and its conversion; equivalence.py measures it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import (
    NormBias,
    NormScale,
    Reads,
    ResidualLayout,
    Writes,
    compress,
    conversion_of,
    fold_affine,
    recenter,
)
from hybridnorm_jax.model.block import stream_norm

Stream = Float[Array, "batch seq embed"]
# Numbers in a patch.
PATCH = 16 * 16 * 3

LAYOUT = ResidualLayout(
    {
        "{patch/kernel,patch/bias,class_token,positions}": Writes(),
        "blocks/{attention/out,down}/{kernel,bias}": Writes(),
        "blocks/attention/{query,key,value}/kernel": Reads("blocks/attention_norm", 1),
        "blocks/up/kernel": Reads("blocks/ffn_norm", 1),
        "head/kernel": Reads("final_norm"),
        "{blocks/attention_norm,blocks/ffn_norm,final_norm}/scale": NormScale(),
        "{blocks/attention_norm,blocks/ffn_norm,final_norm}/bias": NormBias(),
    }
)


class ViTBlock(nn.Module):
    """Y = X + Attn(N(X)); X' = Y + FFN(N(Y)); every token sees all others."""

    config: hn.ModelConfig

    @nn.compact
    def __call__(self, stream: Stream, _: None) -> tuple[Stream, None]:
        config, dtypes = self.config, _dtypes(self.config)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=config.num_heads,
            qkv_features=config.num_heads * config.head_dim,
            out_features=config.d_model,
            name="attention",
            **dtypes,
        )
        up = nn.Dense(config.mlp_dim, name="up", **dtypes)
        down = nn.Dense(config.d_model, name="down", **dtypes)
        stream = stream + attention(_norm_or_identity(config, "attention_norm")(stream))
        hidden = jax.nn.gelu(up(_norm_or_identity(config, "ffn_norm")(stream)), approximate=False)
        return stream + down(hidden), None


class ViT(nn.Module):
    """Patches and a class token -> Pre-Norm blocks -> classes. All projections have biases; positions are learned.

    Attributes:
      config: `max_positions` is the number of tokens, with the class token; `vocab_size` is the number of classes. The
        scheme is "pre", or one without any norm.
    """

    config: hn.ModelConfig

    @nn.compact
    def __call__(self, patches: Float[Array, "batch patches patch"]) -> Float[Array, "batch 1 classes"]:
        config, dtypes = self.config, _dtypes(self.config)
        init, width = nn.initializers.normal(0.02), config.d_model
        stream = nn.Dense(width, name="patch", **dtypes)(patches)
        token = self.param("class_token", init, (1, width), dtypes["param_dtype"]).astype(stream.dtype)
        stream = jnp.concatenate([jnp.broadcast_to(token, (len(stream), 1, width)), stream], axis=1)
        positions = self.param("positions", init, (config.max_positions, width), dtypes["param_dtype"])
        stream = stream + positions.astype(stream.dtype)
        blocks = nn.scan(
            ViTBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            unroll=min(config.scan_unroll, config.num_layers),
        )
        stream, _ = blocks(config, name="blocks")(stream, None)
        hidden = _norm_or_identity(config, "final_norm")(stream[:, :1])
        return nn.Dense(config.vocab_size, name="head", **dtypes)(hidden)


class ViTConversion(NamedTuple):
    """How the parameters of a Pre-LN ViT become those of a cheaper form.

    Attributes:
      config: of the ViT in that form.
      convert: parameters of the Pre-LN model -> those of `config`; pure and differentiable.
    """

    config: hn.ModelConfig
    convert: Callable[[Any], Any]


def vit_conversion(config: hn.ModelConfig, form: str, *, pad_to: int = 1) -> ViTConversion:
    """The conversion of a Pre-LN ViT to `form`, which equivalence.conversion_of is for a Decoder."""

    def convert(params: Any) -> Any:
        centred = recenter(fold_affine(params, LAYOUT), LAYOUT)
        return compress(centred, LAYOUT, pad_to=pad_to) if form == "pre_crmsnorm" else centred

    return ViTConversion(config=conversion_of(config, form, pad_to=pad_to).config, convert=convert)


def _dtypes(config: hn.ModelConfig) -> dict[str, Any]:
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def _norm_or_identity(config: hn.ModelConfig, name: str) -> Callable:
    return stream_norm(config, name=name) if config.has_final_norm else lambda x: x
