"""SCHEMES, the table of every norm placement that has a name.

A new one is one more entry, here or in a file of yours.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from hybridnorm_jax.errors import ConfigError, UserError, did_you_mean
from hybridnorm_jax.model.placement import (
    HEAD_NORMS,
    HIDDEN_NORMS,
    BlockPlacement,
    HeadNorm,
    SideStream,
    SublayerPlacement,
)

# It becomes part of the name of a run.
LONGEST_NAME = 60
BlockRule = Callable[[int, int], BlockPlacement]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A rule for all layers, and what the whole model needs with it.

    Attributes:
      name: the key in SCHEMES.
      block: (layer, num_layers) -> BlockPlacement; layers count from 0.
      final_norm: whether a norm stands before the head.
      side_stream: how the second stream of its placements begins and ends, where they have one.
      embedding_norm: whether a norm stands after the embedding (`model.embedding_norm=auto` follows it).
      initializer: the initializer its authors recommend (`model.initializer=auto` follows it).
    """

    name: str
    block: BlockRule
    final_norm: bool = True
    side_stream: SideStream | None = None
    embedding_norm: bool = False
    initializer: str = "normal"

    def placements(self, num_layers: int) -> tuple[BlockPlacement, ...]:
        """The placement of every layer, first to last.

        Raises:
          ConfigError: the rule, which may be a plugin's, fails for a layer or returns another thing than a placement.
        """
        return tuple(self._placement(layer, num_layers) for layer in range(num_layers))

    def _placement(self, layer: int, num_layers: int) -> BlockPlacement:
        where = f"model.scheme={self.name}: its function, called for layer {layer} of {num_layers},"
        try:
            placement = self.block(layer, num_layers)
        except Exception as error:
            raise ConfigError(f"{where} raises {type(error).__name__}: {error}") from error
        if not isinstance(placement, BlockPlacement):
            raise ConfigError(f"{where} must return a BlockPlacement, not {type(placement).__name__}")
        if placement.has_side_stream != (self.side_stream is not None):
            stated = "has a" if placement.has_side_stream else "has no"
            right = "side_stream of the scheme says how it begins and ends, and all of its placements have it"
            raise ConfigError(f"{where} returns a placement that {stated} side stream; {right}")
        return placement

    def table(self, num_layers: int) -> str:
        """The scheme at this depth as text: one line per stretch of layers with equal placement."""
        placements = self.placements(num_layers)
        lines = [f"{self.name}, {num_layers} layers   (x: the sublayer's input, X: the block's input, N: a norm)"]
        if any(placement.has_learned_scales for placement in placements):
            lines.append("  learned: a, one number; g and w, a number for each channel")
        if self.side_stream is not None:
            lines.append("  s: the side stream, z: what the sublayer adds")
        layers = enumerate(placements)
        for placement, equal in groupby(layers, key=lambda layer: layer[1]):
            lines += _stretch_lines(placement, [number for number, _ in equal])
        lines.append(f"  model: {self._outside_the_blocks()}; initializer {self.initializer}")
        return "\n".join(lines)

    def _outside_the_blocks(self) -> str:
        norms = []
        if self.embedding_norm:
            norms.append("embedding norm")
        if self.side_stream is not None:
            norms.append(self.side_stream.formula)
        if self.final_norm:
            norms.append("final norm")
        return ", ".join(norms) or "no norm outside the blocks"


def _stretch_lines(placement: BlockPlacement, layers: list[int]) -> Iterator[str]:
    """The lines of `Scheme.table` for consecutive layers of one placement."""
    stretch = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
    extents = {name.removesuffix("_norm"): getattr(placement, name) for name in HEAD_NORMS}
    norms = [f"{name} per {extent}" for name, extent in extents.items() if extent is not None]
    norms += [f"FFN's {name.removesuffix('_norm')}" for name in HIDDEN_NORMS if getattr(placement, name)]
    shared = "   one pre norm for both branches" if placement.shared_pre_norm else ""
    shared += "   one learned scale for both branches" if placement.shared_layer_scale else ""
    yield (f"  {stretch}   normalized: {', '.join(norms)}" if norms else f"  {stretch}") + shared
    yield f"    attention     {placement.attention.formula('Attn')}{_starts(placement.attention)}"
    yield f"    feed-forward  {placement.feed_forward.formula('FFN')}{_starts(placement.feed_forward)}"
    if placement.head_scales is not None:
        yield f"    heads         times a learned number each, {placement.head_scales} the output projection"


def _starts(sublayer: SublayerPlacement) -> str:
    """Which learned scales of a sublayer start at another number than 1, in words."""
    found = {name: start for name, start in sublayer.starts._asdict().items() if start != 1.0}
    words = [
        f"{name.replace('_', ' ')} {'' if name == 'layer_scale' else 'norm '}at {start:.4g}"
        for name, start in found.items()
    ]
    return f"   starts: {', '.join(words)}" if words else ""


SCHEMES: dict[str, Scheme] = {}


def scheme(name: str, **model: Any) -> Callable[[BlockRule], BlockRule]:
    """Decorator: enter `(layer, num_layers) -> BlockPlacement` into SCHEMES. `model` are Scheme's other fields."""

    def enter(block: BlockRule) -> BlockRule:
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME):
            raise ValueError(f"a scheme's name must be a text of 1 to {LONGEST_NAME} characters, not {name!r}")
        if name in SCHEMES:
            raise ValueError(f"a scheme named {name!r} already exists")
        SCHEMES[name] = Scheme(name=name, block=block, **model)
        return block

    return enter


def schemes() -> tuple[str, ...]:
    """The names of all schemes, in the order of the table."""
    return tuple(SCHEMES)


def describe(scheme: str, depth: int) -> str:
    """Where a scheme normalizes in a model of `depth` blocks, as text; what `hybridnorm schemes` prints.

    Raises:
      UserError: no scheme of this name, or no block.
    """
    if scheme not in SCHEMES:
        raise UserError(f"{scheme}: no such scheme{did_you_mean(scheme, SCHEMES)}")
    if type(depth) is not int:
        raise UserError(f"depth={depth!r}: must be an integer")
    if depth < 1:
        raise UserError(f"{depth}: a model has at least one block")
    return SCHEMES[scheme].table(depth)


# ---- The table. In the equations N is a norm, X a block's input, Y the attention's result, X' the block's output,
# ---- L the number of blocks, l = layer + 1.

NONE = SublayerPlacement()
PRE = SublayerPlacement(pre=True)
POST = SublayerPlacement(post=True)
PRE_BRANCH = SublayerPlacement(pre=True, branch=True)
PRE_POST = SublayerPlacement(pre=True, post=True)
BRANCH = SublayerPlacement(branch=True)


def normalizing_qkv(attention: SublayerPlacement, feed_forward: SublayerPlacement) -> BlockPlacement:
    """A block that normalizes q, k and v per head: Attn_QKV of HybridNorm."""
    return BlockPlacement(attention, feed_forward, q_norm="head", k_norm="head", v_norm="head")


@scheme("pre")
def pre(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn(N(X)); X' = Y + FFN(N(Y)). HybridNorm (2503.04598), eq. 4."""
    return BlockPlacement(PRE, PRE)


@scheme("post", final_norm=False)
def post(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X + Attn(X)); X' = N(Y + FFN(Y)). HybridNorm, eq. 3; the authors' baseline sets embedding_norm=true."""
    return BlockPlacement(POST, POST)


@scheme("hybrid", initializer="megatron")
def hybrid(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn_QKV(X); X' = N(Y) + FFN(N(Y)). HybridNorm, eq. 6: N(Y) is the attention's post norm here."""
    return normalizing_qkv(POST, NONE)


@scheme("hybrid_star", initializer="megatron")
def hybrid_star(layer: int, num_layers: int) -> BlockPlacement:
    """As hybrid, but block 1 is Y = X + Attn_QKV(N(X)); X' = Y + FFN(N(Y)). HybridNorm*, eq. 7."""
    return normalizing_qkv(PRE, PRE) if layer == 0 else hybrid(layer, num_layers)


@scheme("hybrid_output_norm", initializer="megatron")
def hybrid_output_norm(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid_star with N(Attn(.)), that norm's scale starting at 1/sqrt(2L). HybridNorm's 7B model."""
    placement = hybrid_star(layer, num_layers)
    attention = dataclasses.replace(placement.attention, branch=True, branch_norm_init=1 / math.sqrt(2 * num_layers))
    return dataclasses.replace(placement, attention=attention)


@scheme("hybrid_depth_scaled", initializer="megatron")
def hybrid_depth_scaled(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with both branches times 1/sqrt(l): reported to cure its divergence at large learning rates."""
    scale = 1 / math.sqrt(layer + 1)
    return normalizing_qkv(SublayerPlacement(post=True, branch_scale=scale), SublayerPlacement(branch_scale=scale))


@scheme("span", final_norm=False, initializer="megatron")
def span(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X + Attn(X)); X' = N(X + FFN(Y)); in block 1 Attn reads N(X). SpanNorm (2601.22580).

    Eqs. 5-8 as an independent implementation states them. That the Megatron initializer is SpanNorm's scaling rule
    is this project's derivation: the paper's own rule is not known to us.
    """
    return BlockPlacement(PRE_POST if layer == 0 else POST, SublayerPlacement(post=True, residual="block"))


@scheme("post_final_norm")
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


scheme("mix_ln")(mix_ln(0.25))  # what its authors recommend
scheme("mix_ln_12")(mix_ln(0.125))
scheme("mix_ln_50")(mix_ln(0.5))


@scheme("sandwich")
def sandwich(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + N(Attn(N(X))); X' = Y + N(FFN(N(Y))). Sandwich (2105.13290)."""
    return BlockPlacement(PRE_BRANCH, PRE_BRANCH)


@scheme("peri", embedding_norm=True)
def peri(layer: int, num_layers: int) -> BlockPlacement:
    """sandwich with a norm on the embedding. Peri-LN (2502.02732)."""
    return sandwich(layer, num_layers)


@scheme("peri_no_final_norm", embedding_norm=True, final_norm=False)
def peri_no_final_norm(layer: int, num_layers: int) -> BlockPlacement:
    """peri without the norm before the head. Without the embedding norm, peri is sandwich."""
    return sandwich(layer, num_layers)


@scheme("peri_bare", final_norm=False)
def peri_bare(layer: int, num_layers: int) -> BlockPlacement:
    """peri without a norm outside the blocks."""
    return sandwich(layer, num_layers)


@scheme("reordered")
def reordered(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + N(Attn(X)); X' = Y + N(FFN(Y)); q, k normalized over the projection. OLMo 2 (2501.00656)."""
    return BlockPlacement(BRANCH, BRANCH, q_norm="projection", k_norm="projection")


@scheme("pre_qk_projection")
def pre_qk_projection(layer: int, num_layers: int) -> BlockPlacement:
    """As pre, q and k normalized over the projection. OLMoE (2409.02060)."""
    return BlockPlacement(PRE, PRE, q_norm="projection", k_norm="projection")


@scheme("deepnorm", final_norm=False, initializer="deepnorm")
def deepnorm(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(aX + Attn(X)); X' = N(aY + FFN(Y)), a = (2L)^(1/4). DeepNorm (2203.00555), decoder-only."""
    sublayer = SublayerPlacement(post=True, residual_scale=(2 * num_layers) ** 0.25)
    return BlockPlacement(sublayer, sublayer)


@scheme("deepnorm_final_norm", initializer="deepnorm")
def deepnorm_final_norm(layer: int, num_layers: int) -> BlockPlacement:
    """deepnorm with a norm before the head, as in ProRes' code (2603.05369)."""
    return deepnorm(layer, num_layers)


@scheme("deepnorm_pre", initializer="deepnorm")
def deepnorm_pre(layer: int, num_layers: int) -> BlockPlacement:
    """Y = aX + Attn(N(X)); X' = aY + FFN(N(Y)), a = (2L)^(1/4): not DeepNorm.

    It is what torchscale's decoder computes with deepnorm=True alone, which leaves its norms at the entrance.
    """
    sublayer = SublayerPlacement(pre=True, residual_scale=(2 * num_layers) ** 0.25)
    return BlockPlacement(sublayer, sublayer)


@scheme("layernorm_scaling")
def layernorm_scaling(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn(N(X)/sqrt(l)); X' = Y + FFN(N(Y)/sqrt(l)). LayerNorm Scaling (2502.05795)."""
    sublayer = SublayerPlacement(pre=True, input_scale=1 / math.sqrt(layer + 1))
    return BlockPlacement(sublayer, sublayer)


@scheme("layernorm_scaling_learned")
def layernorm_scaling_learned(layer: int, num_layers: int) -> BlockPlacement:
    """pre, the norms' scales starting at 1/sqrt(l) and learned: LayerNorm Scaling in ProRes' code (2603.05369)."""
    sublayer = SublayerPlacement(pre=True, pre_norm_init=1 / math.sqrt(layer + 1))
    return BlockPlacement(sublayer, sublayer)


@scheme("keel", final_norm=False)
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


@scheme("keel_pre_first", final_norm=False)
def keel_pre_first(layer: int, num_layers: int) -> BlockPlacement:
    """keel whose block 1 is one of pre, in both sublayers."""
    return pre(layer, num_layers) if layer == 0 else keel(layer, num_layers)


@scheme("b2t", final_norm=False, initializer="b2t")
def b2t(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X + Attn(X)); X' = N(X + Y + FFN(Y)). B2T (2206.00330)."""
    return BlockPlacement(POST, SublayerPlacement(post=True, residual="both"))


@scheme("parallel")
def parallel(layer: int, num_layers: int) -> BlockPlacement:
    """X' = X + Attn(N1(X)) + FFN(N2(X)): the parallel residual of GPT-NeoX and Pythia."""
    return BlockPlacement(PRE, SublayerPlacement(pre=True, reads="block"))


@scheme("parallel_one_norm")
def parallel_one_norm(layer: int, num_layers: int) -> BlockPlacement:
    """X' = X + Attn(N(X)) + FFN(N(X)), one norm for both: GPT-J, Falcon 7B, Phi, Cohere."""
    return dataclasses.replace(parallel(layer, num_layers), shared_pre_norm=True)


@scheme("parallel_qk")
def parallel_qk(layer: int, num_layers: int) -> BlockPlacement:
    """As parallel, q and k normalized per head."""
    return dataclasses.replace(parallel(layer, num_layers), q_norm="head", k_norm="head")


@scheme("parallel_one_norm_qk")
def parallel_one_norm_qk(layer: int, num_layers: int) -> BlockPlacement:
    """As parallel_one_norm, q and k normalized per head: Phi, StableLM 2 and Cohere with norms of q and k."""
    return dataclasses.replace(parallel_one_norm(layer, num_layers), q_norm="head", k_norm="head")


@scheme("sandwich_qk")
def sandwich_qk(layer: int, num_layers: int) -> BlockPlacement:
    """As sandwich, q and k normalized per head. Gemma 3 (2503.19786)."""
    return dataclasses.replace(sandwich(layer, num_layers), q_norm="head", k_norm="head")


@scheme("pre_post")
def pre_post(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + Attn(N(X)); X' = N(Y) + FFN(N(Y)). HybridNorm, appendix G."""
    return BlockPlacement(PRE_POST, NONE)


@scheme("post_pre", final_norm=False, embedding_norm=True)
def post_pre(layer: int, num_layers: int) -> BlockPlacement:
    """Y = N(X) + Attn(N(X)); X' = Y + FFN(N(Y)). HybridNorm, appendix G.

    N(X) is the embedding norm in block 1 and the FFN's post norm of the block before in the others.
    """
    return BlockPlacement(NONE, PRE_POST)


# ---- Norms behind projections and inside the FFN, and learned scales.


@scheme("sub_ln", initializer="sub_ln")
def sub_ln(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + W_O N(context(N(X))); X' = Y + W_2 N(act(W_1 N(Y))). Sub-LN, Magneto (2210.06423)."""
    return BlockPlacement(PRE, PRE, context_norm="projection", hidden_norm=True)


@scheme("normformer")
def normformer(layer: int, num_layers: int) -> BlockPlacement:
    """Y = X + N(c Attn(N(X))); X' = Y + W_2 N(act(W_1 N(Y))), c a number for each head. NormFormer (2110.09456).

    As in the authors' code, c multiplies what the output projection writes, in consecutive parts of the channels.
    """
    return BlockPlacement(PRE_BRANCH, PRE, hidden_norm=True, head_scales="after")


@scheme("normformer_before")
def normformer_before(layer: int, num_layers: int) -> BlockPlacement:
    """normformer with c before the output projection, on the context of each head, as in the paper's equation."""
    return BlockPlacement(PRE_BRANCH, PRE, hidden_norm=True, head_scales="before")


@scheme("normformer_residual")
def normformer_residual(layer: int, num_layers: int) -> BlockPlacement:
    """normformer with X' = w Y + ..., w a number for each channel. NormFormer's scale_resids."""
    feed_forward = SublayerPlacement(pre=True, residual_vector=True)
    return dataclasses.replace(normformer(layer, num_layers), feed_forward=feed_forward)


@scheme("simple_norm", initializer="simple_gpt")
def simple_norm(layer: int, num_layers: int) -> BlockPlacement:
    """A norm behind every matrix: on q, k, v over the projection, on both branches, on gate and up (2602.01212)."""
    extents: dict[str, Any] = dict.fromkeys(("q_norm", "k_norm", "v_norm"), "projection")
    return BlockPlacement(BRANCH, BRANCH, **extents, gate_norm=True, up_norm=True)


def _hybrid_with_learned_scale(**learned: Any) -> BlockPlacement:
    """hybrid with learned scales behind both branches."""
    return normalizing_qkv(SublayerPlacement(post=True, **learned), SublayerPlacement(**learned))


@scheme("hybrid_layer_scale", initializer="megatron")
def hybrid_layer_scale(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with a learned number for each channel behind the branches. LayerScale, CaiT (2103.17239), section 2.

    It starts at 0.1 up to 18 layers, at 1e-5 up to 24, and at 1e-6 above.
    """
    start = 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6
    return _hybrid_with_learned_scale(layer_scale="channel", layer_scale_init=start)


@scheme("hybrid_rezero", initializer="megatron")
def hybrid_rezero(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with one learned number for both branches of a block, which starts at 0. ReZero (2003.04887).

    In the authors' code the branches of a block share it.
    """
    placement = _hybrid_with_learned_scale(layer_scale="scalar", layer_scale_init=0.0)
    return dataclasses.replace(placement, shared_layer_scale=True)


@scheme("hybrid_skipinit", initializer="megatron")
def hybrid_skipinit(layer: int, num_layers: int) -> BlockPlacement:
    """hybrid with a learned number behind each branch, which starts at 0. SkipInit (2002.10444)."""
    return _hybrid_with_learned_scale(layer_scale="scalar", layer_scale_init=0.0)


# ---- Two streams: X goes through the blocks as ever, and S, the side stream, gets what the branches give as well.


def _siamese_scale(layer: int) -> float:
    """1/sqrt(2l), as the authors' code has it; the text says 1/sqrt(l+1)."""
    return 1 / math.sqrt(2 * (layer + 1))


@scheme("siamese_hybrid_pre", side_stream=SideStream(main_norm=True))
def siamese_hybrid_pre(layer: int, num_layers: int) -> BlockPlacement:
    """a = Attn_QKV(w X + N(S)), Y = N(X + a/c), S' = S + a; f = FFN(N(Y + N(S'))), X' = Y + f/c, S'' = S' + f.

    c = sqrt(2l), w a learned vector; out N(N(X) + N(S)). SiameseNorm's language model (2602.08064), Hybrid and Pre.
    """
    scale = _siamese_scale(layer)
    attention = SublayerPlacement(post=True, branch_scale=scale, side="read", side_own="vector")
    return normalizing_qkv(attention, SublayerPlacement(pre=True, branch_scale=scale, side="read"))


@scheme("siamese_attn_norm", side_stream=SideStream(main_norm=True))
def siamese_attn_norm(layer: int, num_layers: int) -> BlockPlacement:
    """As siamese_hybrid_pre with N(X) in the place of w X: the other branch of SiameseNorm's code."""
    placement = siamese_hybrid_pre(layer, num_layers)
    return dataclasses.replace(placement, attention=dataclasses.replace(placement.attention, side_own="norm"))


@scheme("siamese_post_pre", side_stream=SideStream(main_norm=True))
def siamese_post_pre(layer: int, num_layers: int) -> BlockPlacement:
    """In every sublayer Y = N(X), z = f(N(Y + N(S))), X' = Y + z/c, S' = S + z, with c = sqrt(2l); out N(N(X) + N(S)).

    SiameseNorm (2602.08064), Post and Pre, as in its vision transformer.
    """
    sublayer = SublayerPlacement(entry=True, pre=True, branch_scale=_siamese_scale(layer), side="read")
    return BlockPlacement(sublayer, sublayer)


@scheme("residual", final_norm=False, side_stream=SideStream(side_norm_eps=1e-7))
def residual(layer: int, num_layers: int) -> BlockPlacement:
    """X' = N(X + f(X)), S' = S + f(X) in every sublayer; out X + N(S), whose eps is 1e-7. ResiDual (2304.14802).

    Its code also has other factors than 1, of S and of X at the end: a scheme of your own with side_scale and
    SideStream(start_scale, main_scale).
    """
    sublayer = SublayerPlacement(post=True, side="written")
    return BlockPlacement(sublayer, sublayer)


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


def _enter_ablation(name: str, placement: BlockPlacement) -> None:
    @scheme(name, initializer="megatron")
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
