"""Where a transformer normalizes, as data.

Every sublayer (attention or feed-forward) of every scheme computes

    y = post(residual_scale * w * r + branch_scale * g * branch(f(input_scale * pre(x))))

with w and g learned where the sublayer has them, and 1 where it has not. A *placement* says which parts of that formula
are present in one block; a *scheme* gives the placement of every layer of a model and what the model around the blocks
needs. Nothing here touches an array.

A scheme of your own is one more entry of the table, in a file of your own:

    import hybridnorm_jax as hn

    @hn.scheme("pre_then_post", final_norm=True, initializer="megatron")
    def pre_then_post(layer, num_layers):
        half = hn.SublayerPlacement(pre=True) if layer < num_layers // 2 else hn.SublayerPlacement(post=True)
        return hn.BlockPlacement(half, half)

`python train.py run.plugins=[my_schemes.py] model.scheme=pre_then_post` then trains it.
"""

import dataclasses
import numbers
from collections.abc import Collection
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

SublayerName = Literal["attention", "feed_forward"]
HeadNorm = Literal["head", "projection"] | None
LearnedScale = Literal["channel", "scalar"] | None
HeadScales = Literal["before", "after"] | None
BranchRamp = Literal["by_depth", "together"]
Joining = Literal["sum", "chord", "geodesic"]
SCALES = ("residual_scale", "branch_scale", "input_scale", "side_scale")
STARTS = ("pre_norm_init", "branch_norm_init", "layer_scale_init")
# The largest of the table is KEEL's 2 L, below 20,000 at the largest depth.
LARGEST_SCALE = 1_000_000
HEAD_NORMS = ("q_norm", "k_norm", "v_norm", "context_norm")
HIDDEN_NORMS = ("gate_norm", "up_norm", "hidden_norm")

Scale = TypeVar("Scale")


class Scales(NamedTuple, Generic[Scale]):
    """The scales of the formula; what holds one where, a number or an array, is the type parameter."""

    residual: Scale
    branch: Scale
    input: Scale
    side: Scale


class Starts(NamedTuple, Generic[Scale]):
    """Where the learned scales of a sublayer start; what holds one start is the type parameter.

    Attributes:
      pre, branch: of the scale of the pre norm, and of the branch norm.
      layer_scale: of the learned scale behind the branch.
    """

    pre: Scale
    branch: Scale
    layer_scale: Scale


def _require(name: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def _require_number(name: str, value: Any) -> None:
    """Refuse what is no number, NaN, infinity, and a size that no scale of a stream can have."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST_SCALE:
        raise ValueError(f"{name}={value!r} must be a number between {-LARGEST_SCALE:,} and {LARGEST_SCALE:,}")


@dataclasses.dataclass(frozen=True)
class SublayerPlacement:
    """Which parts of the formula one sublayer has.

    Attributes:
      pre, branch, post: whether that norm is present.
      residual: what r is: the sublayer's "input", the "block"'s input, or the sum of "both".
      reads: what x is: the sublayer's "input", or the "block"'s (a parallel residual).
      residual_scale, branch_scale, input_scale: the three constants of the formula.
      pre_norm_init, branch_norm_init: initial values of the scales of these norms.
      layer_scale: g of the formula, behind the branch norm: a learned number for each "channel", or one, a "scalar".
      layer_scale_init: its initial value.
      residual_vector: w of the formula: r is multiplied by a learned number for each channel, which starts at 1.
      entry: whether a norm stands at the entrance of the sublayer: of what the branch reads, and of r when that is the
        sublayer's input.
      side: whether there is a second stream s beside x, the side stream, to which side_scale * g * branch(f(...)) is
        added: None, there is none; "written", the branch does not read it; "read", pre reads own(x) + N(s).
      side_own: what own(x) is: x as it is, "whole"; times a learned number for each channel, which starts at 1,
        "vector"; or N(x), "norm".
      side_scale: factor of what is added to the side stream.
      branch_ramp: whether branch_scale is also multiplied by a share that grows from 0 to 1 with the training step:
        None, it is not; "by_depth", in deeper layers for longer; "together". ramps.py has the formula.
      joins: what becomes of r and the branch b = g * branch(f(...)): their "sum", as in the formula; a step along the
        "chord" between their directions, u(u(r) + branch_scale * |g| * (u(b) - u(r))) with u(v) = v / |v|, where g is
        not in b; or along the sphere, "geodesic". formula.py has them.
    """

    pre: bool = False
    branch: bool = False
    post: bool = False
    residual: Literal["input", "block", "both"] = "input"
    reads: Literal["input", "block"] = "input"
    residual_scale: float = 1.0
    branch_scale: float = 1.0
    input_scale: float = 1.0
    branch_norm_init: float = 1.0
    pre_norm_init: float = 1.0
    layer_scale: LearnedScale = None
    layer_scale_init: float = 1.0
    residual_vector: bool = False
    entry: bool = False
    side: Literal["written", "read"] | None = None
    side_own: Literal["whole", "vector", "norm"] = "whole"
    side_scale: float = 1.0
    branch_ramp: BranchRamp | None = None
    joins: Joining = "sum"

    def __post_init__(self) -> None:
        for name in ("pre", "branch", "post", "residual_vector", "entry"):
            _require(name, getattr(self, name), (False, True))
        for name in (*SCALES, *STARTS):
            _require_number(name, getattr(self, name))
        _require("residual", self.residual, ("input", "block", "both"))
        _require("reads", self.reads, ("input", "block"))
        _require("layer_scale", self.layer_scale, (None, "channel", "scalar"))
        _require("side", self.side, (None, "written", "read"))
        _require("side_own", self.side_own, ("whole", "vector", "norm"))
        _require("joins", self.joins, get_args(Joining))
        if self.joins != "sum" and (self.side is not None or self.residual_scale != 1.0):
            raise ValueError(f"joins={self.joins!r}: needs residual_scale=1 and no side stream")
        if self.joins == "chord" and self.layer_scale != "channel":
            raise ValueError("joins='chord': needs layer_scale='channel', the length of the step")
        _require("branch_ramp", self.branch_ramp, (None, *get_args(BranchRamp)))
        if self.side != "read" and self.side_own != "whole":
            raise ValueError(f"side_own={self.side_own!r}: only where the side stream is read, side='read'")
        if self.side is None and self.side_scale != 1.0:
            raise ValueError(f"side_scale={self.side_scale}: there is no side stream, side=None")
        if self.side is not None and self.branch_ramp is not None:
            raise ValueError("branch_ramp: not with a side stream, which would not grow with it")
        if self.side == "read" and self.reads == "block":
            raise ValueError("side='read': the side stream is read beside the sublayer's input, not with reads='block'")
        self._check_starts()

    def _check_starts(self) -> None:
        """Refuse the start of a scale that is not there."""
        absent = {
            "pre_norm_init": not self.pre and "pre=True",
            "branch_norm_init": not self.branch and "branch=True",
            "layer_scale_init": self.layer_scale is None and "layer_scale",
        }
        for name, needed in absent.items():
            if needed and getattr(self, name) != 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: starts a scale that is not there without {needed}")

    @property
    def scales(self) -> Scales[float]:
        """The constants of the formula."""
        return Scales(
            residual=self.residual_scale, branch=self.branch_scale, input=self.input_scale, side=self.side_scale
        )

    @property
    def starts(self) -> Starts[float]:
        """Where its learned scales start."""
        return Starts(pre=self.pre_norm_init, branch=self.branch_norm_init, layer_scale=self.layer_scale_init)

    def without_numbers(self) -> "SublayerPlacement":
        """This placement with every scale 1, and every learned scale starting at 1."""
        ones: dict[str, Any] = dict.fromkeys((*SCALES, *STARTS), 1.0)
        return dataclasses.replace(self, **ones)

    def formula(self, branch_name: str) -> str:
        """The sublayer's equation, such as `N(x + Attn(N(x)))`.

        a and g are a learned number and a learned vector, t is a share that grows, u(v) is v / |v|.
        """

        def times(scale: float, term: str) -> str:
            return term if scale == 1 else f"{scale:.4g} {term}"

        entered = "N(x)" if self.entry else "x"
        reads = "X" if self.reads == "block" else entered
        if self.side == "read":
            own = {"whole": reads, "vector": f"w {reads}", "norm": f"N({reads})"}[self.side_own]
            reads = f"{own} + N(s)"
        read = times(self.input_scale, f"N({reads})" if self.pre else reads)
        normalized = f"N({branch_name}({read}))" if self.branch else f"{branch_name}({read})"
        learned = {None: "", "scalar": "a ", "channel": "g "}[self.layer_scale]
        grows = "" if self.branch_ramp is None else "t "
        branch = f"{grows}{learned}{normalized}"
        residual = {"input": entered, "block": "X", "both": f"({entered} + X)"}[self.residual]
        if self.residual_vector:
            residual = f"w {residual}"
        added = branch if self.side is None else "z"
        total = f"{times(self.residual_scale, residual)} + {times(self.branch_scale, added)}"
        if self.joins == "chord":
            length = times(self.branch_scale, f"{grows}g")
            total = f"u(u({residual}) + {length} (u({normalized}) - u({residual})))"
        elif self.joins == "geodesic":
            total = f"exp_{residual}({times(self.branch_scale, added)})"
        main = f"N({total})" if self.post else total
        return main if self.side is None else f"{main},  s + {times(self.side_scale, 'z')},  z = {branch}"


@dataclasses.dataclass(frozen=True)
class BlockPlacement:
    """The placements of a block's two sublayers and of the norms inside them.

    q_norm, k_norm, v_norm and context_norm are None (absent), "head" (over head_dim, one scale vector shared by all
    heads) or "projection" (over all heads together). q, k, v are normalized before RoPE, the context before the
    output projection. With shared_pre_norm the pre norm of a parallel block is one norm, which both branches read.

    Attributes:
      gate_norm, up_norm: norms over the hidden width of what the FFN's two first projections give (an FFN without a
        gate has the second alone).
      hidden_norm: a norm over the hidden width of what the FFN's last projection reads.
      head_scales: one learned number for each head, starting at 1: "before" the output projection it multiplies the
        context of the head, behind the context norm; "after" it, of as many equal parts of the channels one each.
      shared_layer_scale: both branches have the same learned scale, that of attention.
      sphere: whether attention and the feed-forward layer are those of nGPT (2410.01131): behind the rotation q and k
        of each head are divided by their length and times one learned number for each channel of each head of k, which
        the heads of q that read it share; the scores are times sqrt(head_dim); gate and up are times sqrt(embed) and a
        learned number for each hidden channel.
    """

    attention: SublayerPlacement = SublayerPlacement()
    feed_forward: SublayerPlacement = SublayerPlacement()
    q_norm: HeadNorm = None
    k_norm: HeadNorm = None
    v_norm: HeadNorm = None
    context_norm: HeadNorm = None
    shared_pre_norm: bool = False
    gate_norm: bool = False
    up_norm: bool = False
    hidden_norm: bool = False
    head_scales: HeadScales = None
    shared_layer_scale: bool = False
    sphere: bool = False

    def __post_init__(self) -> None:
        for name in ("attention", "feed_forward"):
            if not isinstance(getattr(self, name), SublayerPlacement):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a SublayerPlacement")
        for name in HEAD_NORMS:
            _require(name, getattr(self, name), (None, "head", "projection"))
        if self.attention.residual == "both":
            raise ValueError("attention.residual='both' would add the block's input twice: attention reads it already")
        for name in ("shared_pre_norm", "shared_layer_scale", "sphere", *HIDDEN_NORMS):
            _require(name, getattr(self, name), (False, True))
        _require("head_scales", self.head_scales, (None, "before", "after"))
        kinds = {(each.layer_scale, each.layer_scale_init) for each in (self.attention, self.feed_forward)}
        if self.shared_layer_scale and (len(kinds) == 2 or self.attention.layer_scale is None):
            raise ValueError("shared_layer_scale=True needs the same layer_scale in both sublayers, of one start")
        if (self.attention.side is None) != (self.feed_forward.side is None):
            raise ValueError("side: both sublayers of a block have the side stream, or neither has")
        reads_one = self.attention.pre and self.feed_forward.pre and self.feed_forward.reads == "block"
        if self.shared_pre_norm and not reads_one:
            raise ValueError("shared_pre_norm=True needs both pre norms, and feed_forward.reads='block'")

    def with_branches_times(self, factor: float) -> "BlockPlacement":
        """This placement with both branch scales times a factor."""

        def times(sublayer: SublayerPlacement) -> SublayerPlacement:
            side_scale = 1.0 if sublayer.side is None else factor * sublayer.side_scale
            return dataclasses.replace(sublayer, branch_scale=factor * sublayer.branch_scale, side_scale=side_scale)

        return dataclasses.replace(self, attention=times(self.attention), feed_forward=times(self.feed_forward))

    @property
    def has_learned_scales(self) -> bool:
        """Whether a sublayer multiplies by something learned that is no norm's."""
        return any(
            sublayer.layer_scale is not None or sublayer.residual_vector or sublayer.side_own == "vector"
            for sublayer in (self.attention, self.feed_forward)
        )

    @property
    def grows(self) -> bool:
        """Whether a branch grows with the training step."""
        return self.attention.branch_ramp is not None or self.feed_forward.branch_ramp is not None

    @property
    def has_side_stream(self) -> bool:
        """Whether the block has a second stream."""
        return self.attention.side is not None

    @property
    def normalizes_hidden(self) -> bool:
        """Whether norms stand inside the feed-forward layer."""
        return any(getattr(self, name) for name in HIDDEN_NORMS)

    @property
    def structure(self) -> "BlockPlacement":
        """This placement with every number 1: equal structures can share one scan."""
        attention, feed_forward = self.attention.without_numbers(), self.feed_forward.without_numbers()
        return dataclasses.replace(self, attention=attention, feed_forward=feed_forward)


@dataclasses.dataclass(frozen=True)
class SideStream:
    """How the second stream of a scheme begins, and how the two become one behind the last block.

        s = start_scale * x                                     x is what enters the first block
        main_scale * x + N(s), or main_scale * N(x) + N(s)      the final norm, where there is one, stands behind

    Attributes:
      start_scale, main_scale: these numbers.
      main_norm: whether it is N(x).
      side_norm_eps: eps of the norm of s; None: that of the model.
    """

    start_scale: float = 1.0
    main_scale: float = 1.0
    main_norm: bool = False
    side_norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("start_scale", "main_scale"):
            _require_number(name, getattr(self, name))
        _require("main_norm", self.main_norm, (False, True))
        if self.side_norm_eps is not None:
            _require_number("side_norm_eps", self.side_norm_eps)

    @property
    def formula(self) -> str:
        """Its two ends as text."""
        main = "N(x)" if self.main_norm else "x"
        begin = "x" if self.start_scale == 1 else f"{self.start_scale:.4g} x"
        end = main if self.main_scale == 1 else f"{self.main_scale:.4g} {main}"
        return f"side stream s from {begin} to {end} + N(s)"
