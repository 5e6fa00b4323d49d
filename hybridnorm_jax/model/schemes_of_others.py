"""Schemes of other papers and of other people's models, with one stream.

In the equations N is a norm, X a block's input, Y the attention's result, X' the block's output, L the number of
blocks, and l = layer + 1.
"""

import dataclasses
import math
from typing import Any

from hybridnorm_jax.model.placement import BlockPlacement, SublayerPlacement
from hybridnorm_jax.model.scheme import BlockRule, scheme
from hybridnorm_jax.model.schemes_of_hybridnorm import POST, PRE, PRE_POST, post, pre

PRE_BRANCH = SublayerPlacement(pre=True, branch=True)
BRANCH = SublayerPlacement(branch=True)


@scheme(
    "span",
    final_norm=False,
    initializer="megatron",
    source="SpanNorm (2601.22580), eqs. 5-8 as a third party's code states them",
    checked="equation only",
)
def span(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X + Attn(X)); X' = N(X + FFN(Y)); in block 1 Attn reads N(X). SpanNorm (2601.22580).

    Eqs. 5-8 as an independent implementation states them. That the Megatron initializer is SpanNorm's scaling rule
    is this project's derivation: the paper's own rule is not known to us.
    """
    return BlockPlacement(PRE_POST if layer == 0 else POST, SublayerPlacement(post=True, residual="block"))


@scheme(
    "post_final_norm",
    source="baseline in the code of Mix-LN (2412.13795) and ProRes (2603.05369)",
    checked="authors' code",
)
def post_final_norm(layer: int, num_layers: int) -> BlockPlacement:
    """post with a norm before the head: the Post-LN baseline of Mix-LN's and ProRes' code."""
    return post(layer, num_layers)


def mix_ln(fraction: float) -> BlockRule:
    """The rule of Mix-LN (2412.13795): the first floor(fraction * L) blocks as post, the rest as pre.

        hn.scheme("mix_ln_75")(hn.mix_ln(0.75))

    Raises:
      ValueError: a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction!r}: must be between 0 and 1")

    def rule(layer: int, num_layers: int) -> BlockPlacement:
        # A fraction such as 0.29 is no binary number: 0.29 * 100 is just below 29.
        posts = math.floor(fraction * num_layers + 1e-9)
        return post(layer, num_layers) if layer < posts else pre(layer, num_layers)

    return rule


# Its authors recommend a quarter.
scheme("mix_ln", source="Mix-LN (2412.13795)", checked="authors' code")(mix_ln(0.25))
scheme("mix_ln_12", source="Mix-LN (2412.13795), with an eighth", checked="equation only")(mix_ln(0.125))
scheme("mix_ln_50", source="Mix-LN (2412.13795), with a half", checked="equation only")(mix_ln(0.5))


@scheme(
    "sandwich",
    source="Sandwich, CogView (2105.13290); compared with GLM-4 and Gemma 2 in transformers",
    checked="third party",
)
def sandwich(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + N(Attn(N(X))); X' = Y + N(FFN(N(Y))). Sandwich (2105.13290)."""
    return BlockPlacement(PRE_BRANCH, PRE_BRANCH)


@scheme(
    "peri", embedding_norm=True, source="Peri-LN (2502.02732); its authors' code was not found", checked="equation only"
)
def peri(layer: int, num_layers: int) -> BlockPlacement:
    """sandwich with a norm on the embedding. Peri-LN (2502.02732)."""
    return sandwich(layer, num_layers)


@scheme(
    "peri_no_final_norm", embedding_norm=True, final_norm=False, source="Peri-LN (2502.02732)", checked="equation only"
)
def peri_no_final_norm(layer: int, num_layers: int) -> BlockPlacement:
    """peri without the norm before the head. Without the embedding norm, peri is sandwich."""
    return sandwich(layer, num_layers)


@scheme("peri_bare", final_norm=False, source="Peri-LN (2502.02732)", checked="equation only")
def peri_bare(layer: int, num_layers: int) -> BlockPlacement:
    """peri without a norm outside the blocks."""
    return sandwich(layer, num_layers)


@scheme("reordered", source="OLMo 2 (2501.00656); compared with OLMo 2 in transformers", checked="third party")
def reordered(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + N(Attn(X)); X' = Y + N(FFN(Y)); q, k normalized over the projection. OLMo 2 (2501.00656)."""
    return BlockPlacement(BRANCH, BRANCH, q_norm="projection", k_norm="projection")


@scheme("pre_qk_projection", source="OLMoE (2409.02060); compared with OLMoE in transformers", checked="third party")
def pre_qk_projection(layer: int, num_layers: int) -> BlockPlacement:
    """As pre, q and k normalized over the projection. OLMoE (2409.02060)."""
    return BlockPlacement(PRE, PRE, q_norm="projection", k_norm="projection")


@scheme(
    "deepnorm",
    final_norm=False,
    initializer="deepnorm",
    source="DeepNorm (2203.00555), decoder-only; torchscale",
    checked="authors' code",
)
def deepnorm(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(aX + Attn(X)); X' = N(aY + FFN(Y)), a = (2L)^(1/4). DeepNorm (2203.00555), decoder-only."""
    sublayer = SublayerPlacement(post=True, residual_scale=(2 * num_layers) ** 0.25)
    return BlockPlacement(sublayer, sublayer)


@scheme(
    "deepnorm_final_norm",
    initializer="deepnorm",
    source="code of ProRes (2603.05369), deeppost",
    checked="authors' code",
)
def deepnorm_final_norm(layer: int, num_layers: int) -> BlockPlacement:
    """deepnorm with a norm before the head, as in ProRes' code (2603.05369)."""
    return deepnorm(layer, num_layers)


@scheme(
    "deepnorm_pre",
    initializer="deepnorm",
    source="torchscale with deepnorm=True alone; no paper's equation",
    checked="authors' code",
)
def deepnorm_pre(layer: int, num_layers: int) -> BlockPlacement:
    """Y = aX + Attn(N(X)); X' = aY + FFN(N(Y)), a = (2L)^(1/4): not DeepNorm.

    It is what torchscale's decoder computes with deepnorm=True alone, which leaves its norms at the entrance.
    """
    sublayer = SublayerPlacement(pre=True, residual_scale=(2 * num_layers) ** 0.25)
    return BlockPlacement(sublayer, sublayer)


@scheme("layernorm_scaling", source="LayerNorm Scaling (2502.05795)", checked="authors' code")
def layernorm_scaling(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn(N(X)/sqrt(l)); X' = Y + FFN(N(Y)/sqrt(l)). LayerNorm Scaling (2502.05795)."""
    sublayer = SublayerPlacement(pre=True, input_scale=1 / math.sqrt(layer + 1))
    return BlockPlacement(sublayer, sublayer)


@scheme("layernorm_scaling_learned", source="code of ProRes (2603.05369)", checked="equation only")
def layernorm_scaling_learned(layer: int, num_layers: int) -> BlockPlacement:
    """pre, the norms' scales starting at 1/sqrt(l) and learned: LayerNorm Scaling in ProRes' code (2603.05369)."""
    sublayer = SublayerPlacement(pre=True, pre_norm_init=1 / math.sqrt(layer + 1))
    return BlockPlacement(sublayer, sublayer)


@scheme(
    "keel", final_norm=False, source="KEEL (2601.19895); block 1 as third parties' code has it", checked="equation only"
)
def keel(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(aX + Attn(N(X))); X' = N(aY + FFN(N(Y))), a = 2L, the number of sublayers. KEEL (2601.19895).

    Block 1: Y = X + Attn(N(X)); X' = N(Y + FFN(N(Y))). No code of the authors was found.
    Implementations by others agree on block 1's attention and on an FFN without a; they disagree on the FFN's post
    norm, which stands here, and which keel_pre_first leaves out.
    """
    sublayer = SublayerPlacement(pre=True, post=True, residual_scale=2.0 * num_layers)
    if layer == 0:
        return BlockPlacement(PRE, dataclasses.replace(sublayer, residual_scale=1.0))
    return BlockPlacement(sublayer, sublayer)


@scheme(
    "keel_pre_first",
    final_norm=False,
    source="KEEL (2601.19895), as another third party's code has it",
    checked="equation only",
)
def keel_pre_first(layer: int, num_layers: int) -> BlockPlacement:
    """keel whose block 1 is one of pre, in both sublayers."""
    return pre(layer, num_layers) if layer == 0 else keel(layer, num_layers)


@scheme("b2t", final_norm=False, initializer="b2t", source="B2T (2206.00330)", checked="authors' code")
def b2t(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X + Attn(X)); X' = N(X + Y + FFN(Y)). B2T (2206.00330)."""
    return BlockPlacement(POST, SublayerPlacement(post=True, residual="both"))


@scheme("parallel", source="GPT-NeoX (2204.06745); compared with GPT-NeoX in transformers", checked="third party")
def parallel(layer: int, num_layers: int) -> BlockPlacement:
    """X' = X + Attn(N1(X)) + FFN(N2(X)): the parallel residual of GPT-NeoX and Pythia."""
    return BlockPlacement(PRE, SublayerPlacement(pre=True, reads="block"))


@scheme(
    "parallel_one_norm",
    source="GPT-J, Falcon 7B, Phi, Cohere; compared with these in transformers",
    checked="third party",
)
def parallel_one_norm(layer: int, num_layers: int) -> BlockPlacement:
    """X' = X + Attn(N(X)) + FFN(N(X)), one norm for both: GPT-J, Falcon 7B, Phi, Cohere."""
    return dataclasses.replace(parallel(layer, num_layers), shared_pre_norm=True)


@scheme("parallel_qk", source="parallel with QK-norm (2302.05442)", checked="equation only")
def parallel_qk(layer: int, num_layers: int) -> BlockPlacement:
    """As parallel, q and k normalized per head."""
    return dataclasses.replace(parallel(layer, num_layers), q_norm="head", k_norm="head")


@scheme(
    "parallel_one_norm_qk",
    source="Phi, StableLM 2, Cohere with QK-norm; compared with these in transformers",
    checked="third party",
)
def parallel_one_norm_qk(layer: int, num_layers: int) -> BlockPlacement:
    """As parallel_one_norm, q and k normalized per head: Phi, StableLM 2 and Cohere with norms of q and k."""
    return dataclasses.replace(parallel_one_norm(layer, num_layers), q_norm="head", k_norm="head")


@scheme("sandwich_qk", source="Gemma 3 (2503.19786); compared with Gemma 3 in transformers", checked="third party")
def sandwich_qk(layer: int, num_layers: int) -> BlockPlacement:
    """As sandwich, q and k normalized per head. Gemma 3 (2503.19786)."""
    return dataclasses.replace(sandwich(layer, num_layers), q_norm="head", k_norm="head")


# ---- Norms behind projections and inside the FFN.


@scheme("sub_ln", initializer="sub_ln", source="Sub-LN, Magneto (2210.06423); torchscale", checked="authors' code")
def sub_ln(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + W_O N(context(N(X))); X' = Y + W_2 N(act(W_1 N(Y))). Sub-LN, Magneto (2210.06423)."""
    return BlockPlacement(PRE, PRE, context_norm="projection", hidden_norm=True)


@scheme("normformer", source="NormFormer (2110.09456) as its code in fairseq", checked="authors' code")
def normformer(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + N(c Attn(N(X))); X' = Y + W_2 N(act(W_1 N(Y))), c a number for each head. NormFormer (2110.09456).

    As in the authors' code, c multiplies what the output projection writes, in consecutive parts of the channels.
    """
    return BlockPlacement(PRE_BRANCH, PRE, hidden_norm=True, head_scales="after")


@scheme("normformer_before", source="NormFormer (2110.09456), the equation of the text", checked="equation only")
def normformer_before(layer: int, num_layers: int) -> BlockPlacement:
    """normformer with c before the output projection, on the context of each head, as in the paper's equation."""
    return BlockPlacement(PRE_BRANCH, PRE, hidden_norm=True, head_scales="before")


@scheme(
    "normformer_residual",
    source="NormFormer (2110.09456), scale_resids of its code in fairseq",
    checked="authors' code",
)
def normformer_residual(layer: int, num_layers: int) -> BlockPlacement:
    """normformer with X' = w Y + ..., w a number for each channel. NormFormer's scale_resids."""
    feed_forward = SublayerPlacement(pre=True, residual_vector=True)
    return dataclasses.replace(normformer(layer, num_layers), feed_forward=feed_forward)


@scheme("simple_norm", initializer="simple_gpt", source="SimpleNorm (2602.01212)", checked="authors' code")
def simple_norm(layer: int, num_layers: int) -> BlockPlacement:
    """A norm behind every matrix: on q, k, v over the projection, on both branches, on gate and up (2602.01212)."""
    extents: dict[str, Any] = dict.fromkeys(("q_norm", "k_norm", "v_norm"), "projection")
    return BlockPlacement(BRANCH, BRANCH, **extents, gate_norm=True, up_norm=True)
