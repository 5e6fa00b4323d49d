"""Schemes with two streams: X goes through the blocks as ever; S, the side stream, gets what the branches give too.

In the equations N is a norm, X a block's input, Y the attention's result, X' the block's output, L the number of
blocks, and l = layer + 1.
"""

import dataclasses
import math

from hybridnorm_jax.model.placement import BlockPlacement, SideStream, SublayerPlacement
from hybridnorm_jax.model.scheme import scheme
from hybridnorm_jax.model.schemes_of_hybridnorm import normalizing_qkv


def _siamese_scale(layer: int) -> float:
    """1/sqrt(2l), as the authors' code has it; the text says 1/sqrt(l+1)."""
    return 1 / math.sqrt(2 * (layer + 1))


@scheme(
    "siamese_hybrid_pre",
    side_stream=SideStream(main_norm=True),
    source="SiameseNorm (2602.08064), language model",
    checked="authors' code",
)
def siamese_hybrid_pre(layer: int, num_layers: int) -> BlockPlacement:
    """a = Attn_QKV(w X + N(S)), Y = N(X + a/c), S' = S + a; f = FFN(N(Y + N(S'))), X' = Y + f/c, S'' = S' + f.

    c = sqrt(2l), w a learned vector; out N(N(X) + N(S)). SiameseNorm's language model (2602.08064), Hybrid and Pre.
    """
    scale = _siamese_scale(layer)
    attention = SublayerPlacement(post=True, branch_scale=scale, side="read", side_own="vector")
    return normalizing_qkv(attention, SublayerPlacement(pre=True, branch_scale=scale, side="read"))


@scheme(
    "siamese_attn_norm",
    side_stream=SideStream(main_norm=True),
    source="SiameseNorm (2602.08064), the other branch of its code",
    checked="authors' code",
)
def siamese_attn_norm(layer: int, num_layers: int) -> BlockPlacement:
    """As siamese_hybrid_pre with N(X) in the place of w X: the other branch of SiameseNorm's code."""
    placement = siamese_hybrid_pre(layer, num_layers)
    return dataclasses.replace(placement, attention=dataclasses.replace(placement.attention, side_own="norm"))


@scheme(
    "siamese_post_pre",
    side_stream=SideStream(main_norm=True),
    source="SiameseNorm (2602.08064), vision transformer",
    checked="authors' code",
)
def siamese_post_pre(layer: int, num_layers: int) -> BlockPlacement:
    """In every sublayer Y = N(X), z = f(N(Y + N(S))), X' = Y + z/c, S' = S + z, with c = sqrt(2l); out N(N(X) + N(S)).

    SiameseNorm (2602.08064), Post and Pre, as in its vision transformer.
    """
    sublayer = SublayerPlacement(entry=True, pre=True, branch_scale=_siamese_scale(layer), side="read")
    return BlockPlacement(sublayer, sublayer)


@scheme(
    "residual",
    final_norm=False,
    side_stream=SideStream(side_norm_eps=1e-7),
    source="ResiDual (2304.14802)",
    checked="authors' code",
)
def residual(layer: int, num_layers: int) -> BlockPlacement:
    """X' = N(X + f(X)), S' = S + f(X) in every sublayer; out X + N(S), whose eps is 1e-7. ResiDual (2304.14802).

    Its code also has other factors than 1, of S and of X at the end: a scheme of your own with side_scale and
    SideStream(start_scale, main_scale).
    """
    sublayer = SublayerPlacement(post=True, side="written")
    return BlockPlacement(sublayer, sublayer)
