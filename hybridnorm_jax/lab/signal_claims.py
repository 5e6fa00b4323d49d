"""What the papers claim of signal and gradients at initialization, compared with what was measured."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hybridnorm_jax.model.schemes import SCHEMES

if TYPE_CHECKING:
    from hybridnorm_jax.lab.signal_at_start import Signal

# Factors, chosen for this project: what counts as growing, shrinking, flat and bounded.
GROWS, SHRINKS, FLAT, BOUNDED = 1.5, 0.5, 4.0, 2.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's claim.

    Attributes:
      statement: the claim, its source, and what counts as true here.
      measure: what it is about, by its name in Signal.measures.
      initializer: of the models that were measured.
      holds: whether the measured numbers agree with it.
      seen: these numbers.
    """

    statement: str
    measure: str
    initializer: str
    holds: bool
    seen: str

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        return f"{verdict:14}[{self.initializer}] {self.statement}\n{'':14}{self.seen}"


# Depth -> what was measured of one scheme with one initializer, in rising order of depth.
ByDepth = Mapping[int, "Signal"]


class Gradient(NamedTuple):
    """A gradient norm that a claim is about: of weights and of the stream they can order differently.

    Attributes:
      of: what it is the gradient of.
      measure: its name in Signal.measures.
      first: index of block 1 among the measure's values.
    """

    of: str
    measure: str
    first: int


GRADIENTS = (
    Gradient(of="weights", measure="gradient/block", first=0),
    Gradient(of="stream", measure="stream_gradient", first=1),
)


def claims(signals: Iterable["Signal"]) -> list[Claim]:
    """Every claim about a scheme that was measured, for each initializer, at the depths that were measured."""
    found: dict[tuple[str, str], dict[int, Signal]] = {}
    for signal in signals:
        found.setdefault((signal.scheme, signal.initializer), {})[signal.depth] = signal
    checked = []
    for (scheme, initializer), by_depth in found.items():
        in_force = SCHEMES[scheme].initializer if initializer == "auto" else initializer
        check = CHECKS.get(scheme)
        if check is not None:
            of_scheme = check(in_force, dict(sorted(by_depth.items())))
            checked += [dataclasses.replace(claim, initializer=initializer) for claim in of_scheme]
    return checked


def _stream_grows(initializer: str, by_depth: ByDepth) -> list[Claim]:
    ratios = {}
    for depth, signal in by_depth.items():
        stream_rms = signal.measures["stream_rms"]
        ratios[depth] = stream_rms[-1] / stream_rms[1]
    rising = list(ratios.values())
    statement = (
        "pre: the stream grows with depth (Pre-Norm, common ground of the papers): its RMS after the last block over "
        f"that after block 1 rises with depth, above {GROWS:g} at the greatest"
    )
    holds = bool(rising == sorted(rising) and rising[-1] > GROWS)
    return [Claim(statement, "stream_rms", initializer, holds, seen=f"last block / block 1: {_listed(ratios)}")]


def _early_gradients_grow(initializer: str, by_depth: ByDepth) -> list[Claim]:
    statement = (
        "pre: early gradients grow (HybridNorm, fig. 2): the gradient norm of block 1's {} over the last block's rises "
        f"with depth, above {FLAT:g} at the greatest"
    )

    def holds(ratios: Sequence[float]) -> bool:
        return list(ratios) == sorted(ratios) and ratios[-1] > FLAT

    return _ratio_claims(statement, initializer, by_depth, holds)


def _of_pre(initializer: str, by_depth: ByDepth) -> list[Claim]:
    return [*_stream_grows(initializer, by_depth), *_early_gradients_grow(initializer, by_depth)]


def _early_gradients_shrink(initializer: str, by_depth: ByDepth) -> list[Claim]:
    statement = (
        "post: early gradients shrink (HybridNorm, fig. 2): the gradient norm of block 1's {} is less than "
        f"{SHRINKS:g} of the last block's at the greatest depth"
    )
    return _ratio_claims(statement, initializer, by_depth, lambda ratios: ratios[-1] < SHRINKS)


def _gradients_stay_flat(initializer: str, by_depth: ByDepth) -> list[Claim]:
    scheme = next(iter(by_depth.values())).scheme
    made = []
    for gradient in GRADIENTS:
        spread = {}
        for depth, signal in by_depth.items():
            blocks = signal.measures[gradient.measure][gradient.first :]
            spread[depth] = float(np.max(blocks) / np.min(blocks))
        statement = (
            f"{scheme}: gradients stay flat (HybridNorm, fig. 2): the gradient norms of the {gradient.of} of all "
            f"blocks lie within a factor of {FLAT:g} at every depth"
        )
        holds = bool(max(spread.values()) < FLAT)
        made.append(
            Claim(statement, gradient.measure, initializer, holds, seen=f"largest / smallest: {_listed(spread)}")
        )
    return made


def _gradients_stay_bounded(initializer: str, by_depth: ByDepth) -> list[Claim]:
    """SpanNorm's claims: of "normal" one, of "megatron" the other, of other initializers none."""
    if len(by_depth) < 2 or initializer not in ("normal", "megatron"):
        return []
    if initializer == "normal":
        what = f"grows with depth without output projections over sqrt(2L), by more than {BOUNDED:g}"
    else:
        what = f"stays bounded in depth with output projections over sqrt(2L), within a factor of {BOUNDED:g}"
    statement = (
        f"span: block 1's gradient over the last block's, of {{}}, {what} from the least depth to the greatest "
        "(SpanNorm's abstract; the rule is this project's derivation)"
    )

    def holds(ratios: Sequence[float]) -> bool:
        change = ratios[-1] / ratios[0]
        return change > BOUNDED if initializer == "normal" else change < BOUNDED

    return _ratio_claims(statement, initializer, by_depth, holds)


def _ratio_claims(
    statement: str, initializer: str, by_depth: ByDepth, holds: Callable[[Sequence[float]], bool]
) -> list[Claim]:
    """One claim for each of GRADIENTS, about its value in block 1 over that in the last block.

    Args:
      statement: {} stands for what the gradient is of.
      holds: takes the ratios in rising order of depth.
    """
    made = []
    for gradient in GRADIENTS:
        ratios = {}
        for depth, signal in by_depth.items():
            values = signal.measures[gradient.measure]
            ratios[depth] = values[gradient.first] / values[-1]
        made.append(
            Claim(
                statement.format(gradient.of),
                gradient.measure,
                initializer,
                holds=bool(holds(list(ratios.values()))),
                seen=f"block 1 / last block: {_listed(ratios)}",
            )
        )
    return made


def _listed(by_depth: Mapping[int, float]) -> str:
    return ", ".join(f"{value:.3g} at L={depth}" for depth, value in by_depth.items())


CHECKS: dict[str, Callable[[str, ByDepth], list[Claim]]] = {
    "pre": _of_pre,
    "post": _early_gradients_shrink,
    "hybrid": _gradients_stay_flat,
    "hybrid_star": _gradients_stay_flat,
    "span": _gradients_stay_bounded,
}
