"""Where a transformer normalizes, as data.

Every sublayer (attention or feed-forward) of every scheme computes

    y = post(residual_scale * r + branch_scale * branch(f(input_scale * pre(x))))

A *placement* says which norms of that formula are present in one block; a *scheme* gives the placement of every
layer of a model and what the model around the blocks needs. Nothing here touches an array.

A scheme of your own is one more entry of the table, in a file of your own:

    import hybridnorm_jax as hn

    @hn.scheme("pre_then_post", final_norm=True, initializer="megatron")
    def pre_then_post(layer, num_layers):
        half = hn.SublayerPlacement(pre=True) if layer < num_layers // 2 else hn.SublayerPlacement(post=True)
        return hn.BlockPlacement(half, half)

`python train.py run.plugins=[my_schemes.py] model.scheme=pre_then_post` then trains it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

HeadNorm = Literal["head", "projection"] | None
HEAD_NORMS = ("q_norm", "k_norm", "v_norm", "context_norm")


def _require(value, allowed, name):
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True)
class SublayerPlacement:
    """Which parts of the formula one sublayer has.

    Attributes:
      pre, branch, post: whether that norm is present.
      residual: what r is: the sublayer's "input", the "block"'s input, or the sum of "both".
      reads: what x is: the sublayer's "input", or the "block"'s (a parallel residual).
      residual_scale, branch_scale, input_scale: the three constants of the formula.
      branch_norm_init: initial value of the branch norm's scale.
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

    def __post_init__(self):
        _require(self.residual, ("input", "block", "both"), "residual")
        _require(self.reads, ("input", "block"), "reads")

    @property
    def scales(self) -> tuple[float, float, float]:
        """(residual_scale, branch_scale, input_scale)."""
        return self.residual_scale, self.branch_scale, self.input_scale

    def formula(self, branch_name: str) -> str:
        """The sublayer's equation, such as `N(x + Attn(N(x)))`."""

        def times(scale, term):
            return term if scale == 1 else f"{scale:.4g} {term}"

        reads = "X" if self.reads == "block" else "x"
        read = times(self.input_scale, f"N({reads})" if self.pre else reads)
        branch = f"N({branch_name}({read}))" if self.branch else f"{branch_name}({read})"
        residual = {"input": "x", "block": "X", "both": "(x + X)"}[self.residual]
        total = f"{times(self.residual_scale, residual)} + {times(self.branch_scale, branch)}"
        return f"N({total})" if self.post else total


@dataclasses.dataclass(frozen=True)
class BlockPlacement:
    """The placements of a block's two sublayers and of the norms inside attention.

    q_norm, k_norm, v_norm and context_norm are None (absent), "head" (over head_dim, one scale vector shared by all
    heads) or "projection" (over all heads together). q, k, v are normalized before RoPE, the context before the
    output projection.
    """

    attention: SublayerPlacement = SublayerPlacement()
    feed_forward: SublayerPlacement = SublayerPlacement()
    q_norm: HeadNorm = None
    k_norm: HeadNorm = None
    v_norm: HeadNorm = None
    context_norm: HeadNorm = None

    def __post_init__(self):
        for name in HEAD_NORMS:
            _require(getattr(self, name), (None, "head", "projection"), name)
        if self.attention.residual == "both":
            raise ValueError("attention.residual='both' would add the block's input twice: attention reads it already")

    @property
    def structure(self) -> "BlockPlacement":
        """This placement with every scale 1: equal structures can share one scan."""
        unit = {"residual_scale": 1.0, "branch_scale": 1.0, "input_scale": 1.0}
        return dataclasses.replace(
            self,
            attention=dataclasses.replace(self.attention, **unit),
            feed_forward=dataclasses.replace(self.feed_forward, **unit),
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers of one structure: one scan.

    `scales` holds, for each sublayer ("attention", "feed_forward") and each scale of the formula, one number per
    layer, or None where all are 1.
    """

    start: int
    structure: BlockPlacement
    placements: tuple[BlockPlacement, ...]

    @property
    def length(self) -> int:
        return len(self.placements)

    def scales(self, sublayer: str) -> tuple[tuple[float, ...] | None, ...]:
        """Per layer values of (residual_scale, branch_scale, input_scale), each None where all are 1."""
        columns = zip(*(getattr(placement, sublayer).scales for placement in self.placements), strict=True)
        return tuple(None if all(value == 1.0 for value in column) else column for column in columns)


def runs(placements: Iterable[BlockPlacement]) -> tuple[Run, ...]:
    """Group consecutive placements that differ only in scales."""
    groups: list[list[BlockPlacement]] = []
    starts: list[int] = []
    for layer, placement in enumerate(placements):
        if groups and groups[-1][0].structure == placement.structure:
            groups[-1].append(placement)
        else:
            groups.append([placement])
            starts.append(layer)
    return tuple(Run(start, group[0].structure, tuple(group)) for start, group in zip(starts, groups, strict=True))
