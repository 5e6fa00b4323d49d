"""SCHEMES, the table of every norm placement that has a name.

A new one is one more entry, here or in a file of yours.
"""

import dataclasses
import math
from collections.abc import Callable

from hybridnorm_jax.model.placement import HEAD_NORMS, BlockPlacement, SublayerPlacement


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A rule for all layers, and what the whole model needs with it.

    Attributes:
      name: the key in SCHEMES.
      block: (layer, num_layers) -> BlockPlacement; layers count from 0.
      final_norm: whether a norm stands before the head.
      embedding_norm: whether a norm stands after the embedding (`model.embedding_norm=auto` follows it).
      initializer: the initializer its authors recommend (`model.initializer=auto` follows it).
    """

    name: str
    block: Callable[[int, int], BlockPlacement]
    final_norm: bool = True
    embedding_norm: bool = False
    initializer: str = "normal"

    def placements(self, num_layers: int) -> tuple[BlockPlacement, ...]:
        """The placement of every layer, first to last."""
        return tuple(self.block(layer, num_layers) for layer in range(num_layers))

    def table(self, num_layers: int) -> str:
        """The scheme at this depth as text: one line per stretch of layers with equal placement."""
        lines = [f"{self.name}, {num_layers} layers   (x: the sublayer's input, X: the block's input, N: a norm)"]
        placements = self.placements(num_layers)
        for start, placement in enumerate(placements):
            if start and placement == placements[start - 1]:
                continue
            stop = next((end for end in range(start, num_layers) if placements[end] != placement), num_layers)
            norms = [f"{name[:-5]} per {getattr(placement, name)}" for name in HEAD_NORMS if getattr(placement, name)]
            span = f"layer {start}" if stop == start + 1 else f"layers {start}-{stop - 1}"
            lines.append(f"  {span}" + (f"   normalized: {', '.join(norms)}" if norms else ""))
            lines.append(f"    attention     {placement.attention.formula('Attn')}")
            lines.append(f"    feed-forward  {placement.feed_forward.formula('FFN')}")
        around = ["embedding norm"] * self.embedding_norm + ["final norm"] * self.final_norm
        lines.append(f"  model: {', '.join(around) or 'no norm outside the blocks'}; initializer {self.initializer}")
        return "\n".join(lines)


SCHEMES: dict[str, Scheme] = {}


def scheme(name: str, **model) -> Callable:
    """Decorator: enter `(layer, num_layers) -> BlockPlacement` into SCHEMES. `model` are Scheme's other fields."""

    def enter(block):
        if name in SCHEMES:
            raise ValueError(f"a scheme named {name!r} already exists")
        SCHEMES[name] = Scheme(name, block, **model)
        return block

    return enter


# ---- The table. In the equations N is a norm, X a block's input, Y the attention's result, X' the block's output,
# ---- L the number of blocks, l = layer + 1.

NONE = SublayerPlacement()
PRE = SublayerPlacement(pre=True)
POST = SublayerPlacement(post=True)
PRE_BRANCH = SublayerPlacement(pre=True, branch=True)
PRE_POST = SublayerPlacement(pre=True, post=True)
BRANCH = SublayerPlacement(branch=True)
QKV_HEADS = {"q_norm": "head", "k_norm": "head", "v_norm": "head"}


@scheme("pre")
def pre(layer, num_layers):
    """Y = X + Attn(N(X)); X' = Y + FFN(N(Y)). HybridNorm (2503.04598), eq. 4."""
    return BlockPlacement(PRE, PRE)


@scheme("post", final_norm=False)
def post(layer, num_layers):
    """Y = N(X + Attn(X)); X' = N(Y + FFN(Y)). HybridNorm, eq. 3; the authors' baseline sets embedding_norm=true."""
    return BlockPlacement(POST, POST)


@scheme("hybrid", initializer="megatron")
def hybrid(layer, num_layers):
    """Y = X + Attn_QKV(X); X' = N(Y) + FFN(N(Y)). HybridNorm, eq. 6: N(Y) is the attention's post norm here."""
    return BlockPlacement(POST, NONE, **QKV_HEADS)


@scheme("hybrid_star", initializer="megatron")
def hybrid_star(layer, num_layers):
    """As hybrid, but block 1 is Y = X + Attn_QKV(N(X)); X' = Y + FFN(N(Y)). HybridNorm*, eq. 7."""
    return BlockPlacement(PRE, PRE, **QKV_HEADS) if layer == 0 else hybrid(layer, num_layers)


@scheme("hybrid_output_norm", initializer="megatron")
def hybrid_output_norm(layer, num_layers):
    """hybrid_star with N(Attn(.)), that norm's scale starting at 1/sqrt(2L). HybridNorm's 7B model."""
    placement = hybrid_star(layer, num_layers)
    attention = dataclasses.replace(placement.attention, branch=True, branch_norm_init=1 / math.sqrt(2 * num_layers))
    return dataclasses.replace(placement, attention=attention)


@scheme("hybrid_depth_scaled", initializer="megatron")
def hybrid_depth_scaled(layer, num_layers):
    """hybrid with both branches times 1/sqrt(l): reported to cure its divergence at large learning rates."""
    scale = 1 / math.sqrt(layer + 1)
    return BlockPlacement(
        SublayerPlacement(post=True, branch_scale=scale), SublayerPlacement(branch_scale=scale), **QKV_HEADS
    )


@scheme("span", final_norm=False, initializer="megatron")
def span(layer, num_layers):
    """Y = N(X + Attn(X)); X' = N(X + FFN(Y)); in block 1 Attn reads N(X). SpanNorm (2601.22580).

    Eqs. 5-8 as an independent implementation states them. That the Megatron initializer is SpanNorm's scaling rule
    is this project's derivation: the paper's own rule is not known to us.
    """
    return BlockPlacement(PRE_POST if layer == 0 else POST, SublayerPlacement(post=True, residual="block"))


@scheme("mix_ln")
def mix_ln(layer, num_layers):
    """The first floor(L/4) blocks as post, the rest as pre. Mix-LN (2412.13795), a = 0.25."""
    return post(layer, num_layers) if layer < num_layers // 4 else pre(layer, num_layers)


@scheme("sandwich")
def sandwich(layer, num_layers):
    """Y = X + N(Attn(N(X))); X' = Y + N(FFN(N(Y))). Sandwich (2105.13290)."""
    return BlockPlacement(PRE_BRANCH, PRE_BRANCH)


@scheme("peri", embedding_norm=True)
def peri(layer, num_layers):
    """sandwich with a norm on the embedding. Peri-LN (2502.02732)."""
    return sandwich(layer, num_layers)


@scheme("reordered")
def reordered(layer, num_layers):
    """Y = X + N(Attn(X)); X' = Y + N(FFN(Y)); q, k normalized over the projection. OLMo 2 (2501.00656)."""
    return BlockPlacement(BRANCH, BRANCH, q_norm="projection", k_norm="projection")


@scheme("pre_qk_projection")
def pre_qk_projection(layer, num_layers):
    """As pre, q and k normalized over the projection. OLMoE (2409.02060)."""
    return BlockPlacement(PRE, PRE, q_norm="projection", k_norm="projection")


@scheme("deepnorm", final_norm=False, initializer="deepnorm")
def deepnorm(layer, num_layers):
    """Y = N(aX + Attn(X)); X' = N(aY + FFN(Y)), a = (2L)^(1/4). DeepNorm (2203.00555), decoder-only."""
    sublayer = SublayerPlacement(post=True, residual_scale=(2 * num_layers) ** 0.25)
    return BlockPlacement(sublayer, sublayer)


@scheme("layernorm_scaling")
def layernorm_scaling(layer, num_layers):
    """Y = X + Attn(N(X)/sqrt(l)); X' = Y + FFN(N(Y)/sqrt(l)). LayerNorm Scaling (2502.05795)."""
    sublayer = SublayerPlacement(pre=True, input_scale=1 / math.sqrt(layer + 1))
    return BlockPlacement(sublayer, sublayer)


@scheme("keel", final_norm=False)
def keel(layer, num_layers):
    """Y = N(aX + Attn(N(X))); X' = N(aY + FFN(N(Y))), a = 2L, the number of sublayers. KEEL (2601.19895)."""
    sublayer = SublayerPlacement(pre=True, post=True, residual_scale=2.0 * num_layers)
    return BlockPlacement(sublayer, sublayer)


@scheme("b2t", final_norm=False, initializer="b2t")
def b2t(layer, num_layers):
    """Y = N(X + Attn(X)); X' = N(X + Y + FFN(Y)). B2T (2206.00330)."""
    return BlockPlacement(POST, SublayerPlacement(post=True, residual="both"))


@scheme("parallel")
def parallel(layer, num_layers):
    """X' = X + Attn(N1(X)) + FFN(N2(X)): the parallel residual of GPT-NeoX and Pythia."""
    return BlockPlacement(PRE, SublayerPlacement(pre=True, reads="block"))


@scheme("pre_post")
def pre_post(layer, num_layers):
    """Y = X + Attn(N(X)); X' = N(Y) + FFN(N(Y)). HybridNorm, appendix G."""
    return BlockPlacement(PRE_POST, NONE)


@scheme("post_pre", final_norm=False, embedding_norm=True)
def post_pre(layer, num_layers):
    """Y = N(X) + Attn(N(X)); X' = Y + FFN(N(Y)). HybridNorm, appendix G.

    N(X) is the embedding norm in block 1 and the FFN's post norm of the block before in the others.
    """
    return BlockPlacement(NONE, PRE_POST)


def _ablation(form: str, normalized: str) -> Scheme:
    """HybridNorm's appendix G: #-Post, #-Pre, Pre-#-Post and Pre-#-Pre for # = `normalized`.

    A leading Pre- is Attn(N(X)), otherwise Attn(X); -Post is X' = N(Y) + FFN(N(Y)), -Pre is X' = Y + FFN(N(Y)).
    `#` in qk, kv, qkv, qkc, kc, qkvc says which of q, k, v and the context c are normalized, per head.
    """
    norms = {{"c": "context"}.get(letter, letter) + "_norm": "head" for letter in normalized}
    leading, ending = form.startswith("pre_"), form.removeprefix("pre_").removeprefix("#_")
    attention = SublayerPlacement(pre=leading, post=ending == "post")
    placement = BlockPlacement(attention, PRE if ending == "pre" else NONE, **norms)
    return Scheme(form.replace("#", normalized), lambda layer, num_layers: placement, initializer="megatron")


for _form in ("#_post", "#_pre", "pre_#_post", "pre_#_pre"):
    for _normalized in ("qk", "kv", "qkv", "qkc", "kc", "qkvc"):
        _entry = _ablation(_form, _normalized)
        SCHEMES[_entry.name] = _entry
