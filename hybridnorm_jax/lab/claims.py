"""What the papers say of signal and gradients at initialization, held against what was measured."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridnorm_jax.model.schemes import SCHEMES

if TYPE_CHECKING:
    from hybridnorm_jax.lab.signal import Signal

# Factors, chosen for this project: what counts as growing, shrinking, flat and bounded.
GROWS, SHRINKS, FLAT, BOUNDED = 1.5, 0.5, 4.0, 2.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's claim.

    Attributes:
      statement: with its source and what counts as true here.
      initializer: of the models it was held against.
      holds: whether it was seen.
      seen: the numbers.
    """

    statement: str
    initializer: str
    holds: bool
    seen: str

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"{verdict:14}[{self.initializer}] {self.statement}\n{'':14}{self.seen}"


def claims(signals: Iterable["Signal"]) -> list[Claim]:
    """Every claim about a scheme that was measured, for each initializer, at the depths there are."""
    found: dict[tuple[str, str], dict[int, Signal]] = {}
    for signal in signals:
        found.setdefault((signal.scheme, signal.initializer), {})[signal.depth] = signal
    held = []
    for (scheme, initializer), by_depth in found.items():
        in_force = SCHEMES[scheme].initializer if initializer == "auto" else initializer
        for judge in JUDGES.get(scheme, ()):
            judged = judge(in_force, dict(sorted(by_depth.items())))
            held += [dataclasses.replace(claim, initializer=initializer) for claim in judged]
    return held


ByDepth = Mapping[int, "Signal"]


def _pre_grows(initializer: str, by_depth: ByDepth) -> list[Claim]:
    ratios = {depth: s.measures["stream_rms"][-1] / s.measures["stream_rms"][1] for depth, s in by_depth.items()}
    grown = list(ratios.values())
    statement = (
        "pre: the stream grows with depth (Pre-Norm, common ground of the papers): its RMS after the last block over "
        f"that after block 1 rises with depth, above {GROWS:g} at the greatest"
    )
    holds = bool(grown == sorted(grown) and grown[-1] > GROWS)
    return [Claim(statement, initializer, holds, f"last block / block 1: {_listed(ratios)}")]


def _post_shrinks(initializer: str, by_depth: ByDepth) -> list[Claim]:
    statement = (
        "post: early gradients shrink (HybridNorm, fig. 2): the gradient norm of block 1's {} is less than "
        f"{SHRINKS:g} of the last block's at the greatest depth"
    )
    return _ratio_claims(statement, initializer, by_depth, lambda ratios: ratios[-1] < SHRINKS)


def _hybrid_flat(initializer: str, by_depth: ByDepth) -> list[Claim]:
    claims = []
    for what, name, first in (("weights", "gradient/block", 0), ("stream", "stream_gradient", 1)):
        spread = {
            depth: float(np.max(s.measures[name][first:]) / np.min(s.measures[name][first:]))
            for depth, s in by_depth.items()
        }
        statement = (
            f"{next(iter(by_depth.values())).scheme}: gradients stay flat (HybridNorm, fig. 2): the gradient norms of "
            f"the {what} of all blocks lie within a factor of {FLAT:g} at every depth"
        )
        seen = f"largest / smallest: {_listed(spread)}"
        claims.append(Claim(statement, initializer, bool(max(spread.values()) < FLAT), seen))
    return claims


def _span_bounded(initializer: str, by_depth: ByDepth) -> list[Claim]:
    if initializer not in ("normal", "megatron"):
        return []  # nobody claims anything of the others
    grows = initializer == "normal"
    what = (
        f"grows with depth without output projections over sqrt(2L), by more than {BOUNDED:g}"
        if grows
        else f"stays bounded in depth with output projections over sqrt(2L), within a factor of {BOUNDED:g}"
    )
    statement = (
        f"span: block 1's gradient over the last block's, of {{}}, {what} from the least depth to the greatest "
        "(SpanNorm's abstract; the rule is this project's derivation)"
    )

    def holds(ratios: Sequence[float]) -> bool:
        change = ratios[-1] / ratios[0]
        return change > BOUNDED if grows else change < BOUNDED

    return _ratio_claims(statement, initializer, by_depth, holds) if len(by_depth) > 1 else []


def _ratio_claims(
    statement: str, initializer: str, by_depth: ByDepth, holds: Callable[[Sequence[float]], bool]
) -> list[Claim]:
    """One claim for the weights and one for the stream: they can order differently."""
    claims = []
    for what, name, first in (("weights", "gradient/block", 0), ("stream", "stream_gradient", 1)):
        ratios = {depth: s.measures[name][first] / s.measures[name][-1] for depth, s in by_depth.items()}
        seen = f"block 1 / last block: {_listed(ratios)}"
        claims.append(Claim(statement.format(what), initializer, bool(holds(list(ratios.values()))), seen))
    return claims


def _listed(by_depth: Mapping[int, float]) -> str:
    return ", ".join(f"{value:.3g} at L={depth}" for depth, value in by_depth.items())


JUDGES = {
    "pre": (_pre_grows,),
    "post": (_post_shrinks,),
    "hybrid": (_hybrid_flat,),
    "hybrid_star": (_hybrid_flat,),
    "span": (_span_bounded,),
}
