"""Schemes of HybridNorm (2503.04598), those that its authors compare it with, and those made from it.

In the equations N is a norm, X a block's input, Y the attention's result, X' the block's output, L the number of
blocks, and l = layer + 1.
"""

import dataclasses
import math
from typing import Any

from hybridnorm_jax.model.placement import BlockPlacement, HeadNorm, SublayerPlacement
from hybridnorm_jax.model.scheme import scheme

NONE = SublayerPlacement()
PRE = SublayerPlacement(pre=True)
POST = SublayerPlacement(post=True)
PRE_POST = SublayerPlacement(pre=True, post=True)


def normalizing_qkv(attention: SublayerPlacement, feed_forward: SublayerPlacement) -> BlockPlacement:
    """A block that normalizes q, k and v per head: Attn_QKV of HybridNorm."""
    return BlockPlacement(attention, feed_forward, q_norm="head", k_norm="head", v_norm="head")


@scheme("pre", source="HybridNorm (2503.04598), eq. 4", checked="authors' code")
def pre(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn(N(X)); X' = Y + FFN(N(Y)). HybridNorm (2503.04598), eq. 4."""
    return BlockPlacement(PRE, PRE)


@scheme("post", final_norm=False, source="HybridNorm (2503.04598), eq. 3", checked="authors' code")
def post(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X + Attn(X)); X' = N(Y + FFN(Y)). HybridNorm, eq. 3; the authors' baseline sets embedding_norm=true."""
    return BlockPlacement(POST, POST)


@scheme("hybrid", initializer="megatron", source="HybridNorm (2503.04598), eq. 6", checked="authors' code")
def hybrid(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn_QKV(X); X' = N(Y) + FFN(N(Y)). HybridNorm, eq. 6: N(Y) is the attention's post norm here."""
    return normalizing_qkv(POST, NONE)


@scheme("hybrid_star", initializer="megatron", source="HybridNorm (2503.04598), eq. 7", checked="authors' code")
def hybrid_star(layer: int, num_layers: int) -> BlockPlacement:
    """As hybrid, but block 1 is Y = X + Attn_QKV(N(X)); X' = Y + FFN(N(Y)). HybridNorm*, eq. 7."""
    return normalizing_qkv(PRE, PRE) if layer == 0 else hybrid(layer, num_layers)


@scheme(
    "hybrid_output_norm",
    initializer="megatron",
    source="HybridNorm (2503.04598), the 7B model",
    checked="equation only",
)
def hybrid_output_norm(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid_star with N(Attn(.)), that norm's scale starting at 1/sqrt(2L). HybridNorm's 7B model."""
    placement = hybrid_star(layer, num_layers)
    attention = dataclasses.replace(placement.attention, branch=True, branch_norm_init=1 / math.sqrt(2 * num_layers))
    return dataclasses.replace(placement, attention=attention)


@scheme(
    "hybrid_depth_scaled",
    initializer="megatron",
    source="reported by others, as a cure of hybrid at large learning rates",
    checked="equation only",
)
def hybrid_depth_scaled(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with both branches times 1/sqrt(l): reported to cure its divergence at large learning rates."""
    scale = 1 / math.sqrt(layer + 1)
    return normalizing_qkv(SublayerPlacement(post=True, branch_scale=scale), SublayerPlacement(branch_scale=scale))


def _hybrid_with_learned_scale(**learned: Any) -> BlockPlacement:
    """hybrid with learned scales behind both branches."""
    return normalizing_qkv(SublayerPlacement(post=True, **learned), SublayerPlacement(**learned))


@scheme(
    "hybrid_layer_scale",
    initializer="megatron",
    source="LayerScale, CaiT (2103.17239), section 2, on hybrid",
    checked="equation only",
)
def hybrid_layer_scale(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with a learned number for each channel behind the branches. LayerScale, CaiT (2103.17239), section 2.

    It starts at 0.1 up to 18 layers, at 1e-5 up to 24, and at 1e-6 above. The paper says so of 18, of 24 and of deeper
    models; which of the two a depth between 18 and 24 takes is our choice. In the authors' code (facebookresearch/deit,
    cait_models.py) it is 1e-5 with 24 blocks and 1e-6 with 36 and 48.
    """
    start = 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6
    return _hybrid_with_learned_scale(layer_scale="channel", layer_scale_init=start)


@scheme("hybrid_rezero", initializer="megatron", source="ReZero (2003.04887), on hybrid", checked="equation only")
def hybrid_rezero(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with one learned number for both branches of a block, which starts at 0. ReZero (2003.04887).

    In the authors' code (majumderb/rezero, rztx.py) it is `resweight`, one zero, which the branches of a block share.
    """
    placement = _hybrid_with_learned_scale(layer_scale="scalar", layer_scale_init=0.0)
    return dataclasses.replace(placement, shared_layer_scale=True)


@scheme("hybrid_skipinit", initializer="megatron", source="SkipInit (2002.10444), on hybrid", checked="equation only")
def hybrid_skipinit(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with a learned number behind each branch, which starts at 0. SkipInit (2002.10444).

    As others report the paper, 0 or a small number. In its authors' later code (google-deepmind/deepmind-research,
    nfnets/nf_resnet.py) each branch has a `skip_gain` that starts at 0.
    """
    return _hybrid_with_learned_scale(layer_scale="scalar", layer_scale_init=0.0)


@scheme("pre_post", source="HybridNorm (2503.04598), appendix G", checked="equation only")
def pre_post(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn(N(X)); X' = N(Y) + FFN(N(Y)). HybridNorm, appendix G."""
    return BlockPlacement(PRE_POST, NONE)


@scheme(
    "post_pre",
    final_norm=False,
    embedding_norm=True,
    source="HybridNorm (2503.04598), appendix G",
    checked="equation only",
)
def post_pre(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X) + Attn(N(X)); X' = Y + FFN(N(Y)). HybridNorm, appendix G.

    N(X) is the embedding norm in block 1 and the FFN's post norm of the block before in the others.
    """
    return BlockPlacement(NONE, PRE_POST)


# ---- HybridNorm's appendix G: four forms, with every choice of what attention normalizes per head, such as
# ---- "pre_qkv_post". A leading pre is Attn(N(X)), without it Attn(X); post is X' = N(Y) + FFN(N(Y)), pre is
# ---- X' = Y + FFN(N(Y)); in between stand the letters of q, k, v and the context c that are normalized.

FORMS = {
    "{}_post": (POST, NONE),
    "{}_pre": (NONE, PRE),
    "pre_{}_post": (PRE_POST, NONE),
    "pre_{}_pre": (PRE, PRE),
}


def _per_head(letter: str, normalized: str) -> HeadNorm:
    return "head" if letter in normalized else None


# Those of which the authors' code gave tensors; qkv_post is hybrid by another name.
_COMPARED = ("pre_qk_pre", "pre_qkv_pre", "qkv_post", "qkvc_post")


def _enter_ablation(name: str, placement: BlockPlacement) -> None:
    checked = "authors' code" if name in _COMPARED else "equation only"

    @scheme(name, initializer="megatron", source="HybridNorm (2503.04598), appendix G", checked=checked)
    def ablation(layer: int, num_layers: int) -> BlockPlacement:
        return placement


for _form, (_attention, _feed_forward) in FORMS.items():
    for _letters in ("qk", "kv", "qkv", "qkc", "kc", "qkvc"):
        _placement = BlockPlacement(
            _attention,
            _feed_forward,
            q_norm=_per_head("q", _letters),
            k_norm=_per_head("k", _letters),
            v_norm=_per_head("v", _letters),
            context_norm=_per_head("c", _letters),
        )
        _enter_ablation(_form.format(_letters), _placement)
