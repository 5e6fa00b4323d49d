"""What can and what cannot be concluded from a comparison, in sentences that its numbers decide."""

from collections.abc import Iterator

from hybridnorm_jax.lab.report.difference_tables import corrected
from hybridnorm_jax.lab.report.formats import interval_text, loss_text, rate_text, signed_text
from hybridnorm_jax.lab.report.scaling import FEWEST_SIZES, families
from hybridnorm_jax.lab.report.significance import LEVEL, told_difference
from hybridnorm_jax.lab.report.statistics import ComparedRuns, Difference


def conclusions(compared: ComparedRuns) -> Iterator[str]:
    """Sentences: who is told apart after Holm's correction, who is not, what these seeds could tell, and the limits."""
    found = {label: each for label, each in compared.best_differences.items() if each is not None}
    tested = {label: each for label, each in found.items() if each.inference is not None}
    if tested:
        yield from _verdicts(compared, tested)
    elif found:
        yield "With one seed on each side nothing can be concluded: any difference may be chance."
    else:
        yield "Nothing can be concluded about differences: no label can be compared with the baseline."
    yield from _divergences(compared)
    at_edge = edges(compared)
    if at_edge:
        names = ", ".join(at_edge)
        yield f"The best learning rate of {names} lies at the edge of what was tried, so a lower loss may lie beyond."
    if len(tested) > 1:
        yield "Labels were compared with the baseline only; this page does not say whether they differ from each other."
    if all(family.line is None for family in families(compared)):
        yield f"Fewer than {FEWEST_SIZES} sizes of a scheme were trained: how losses change with size is not said."
    yield "All of this holds for this data, this length of training and these settings, which stand at the end."


def edges(compared: ComparedRuns) -> dict[str, str]:
    """Label -> "smallest" or "largest", where its best learning rate is that of those that were tried."""
    found = {}
    for label in compared.labels:
        best, tried = compared.best[label], compared.tried(label)
        if len(tried) > 1 and best in (tried[0], tried[-1]):
            found[label] = "smallest" if best == tried[0] else "largest"
    return found


def _verdicts(compared: ComparedRuns, tested: dict[str, Difference]) -> Iterator[str]:
    p_values = dict(zip(tested, corrected(list(tested.values())), strict=True))
    told = {label: each for label, each in tested.items() if p_values[label] < LEVEL}
    whose = compared.baseline if compared.has_one_baseline else "its baseline"
    of_all = "in the only comparison that was made"
    if len(tested) > 1:
        of_all = f"after Holm's correction for {len(tested)} comparisons"
    for verdict, sign in (("better", -1), ("worse", 1)):
        mine = {label: each for label, each in told.items() if each.mean * sign > 0}
        if mine:
            listed = "; ".join(_with_interval(label, each) for label, each in mine.items())
            yield f"Told apart as {verdict} than {whose} {of_all}: {listed}."
    untold = {label: each for label, each in tested.items() if label not in told}
    if untold:
        begins = "Not told apart" if told else "No label is told apart"
        yield (
            f"{begins} from {whose} {of_all}: {', '.join(untold)}. That does not mean that they are equal: with "
            f"{_limits(untold)}."
        )


def _with_interval(label: str, found: Difference) -> str:
    return f"{label} ({signed_text(found.mean)} nats, {interval_text(found.inference.interval)})"


def _limits(found: dict[str, Difference]) -> str:
    """Which true difference would have been found, for the labels that were not told apart."""
    counts = sorted({len(each.seeds) for each in found.values()})
    seeds = " to ".join(dict.fromkeys(str(count) for count in (counts[0], counts[-1])))
    told = sorted(told_difference(each.deviation, len(each.seeds)) for each in found.values())
    sizes = " to ".join(dict.fromkeys(loss_text(size) for size in (told[0], told[-1])))
    return (
        f"{seeds} seeds only a true difference of {sizes} nats would have been found with a probability of 80 % "
        "(at 5 %, for one comparison)"
    )


def _divergences(compared: ComparedRuns) -> Iterator[str]:
    parts = []
    for label in compared.labels:
        rates = sorted({run.rate for run in compared.runs if run.label == label and run.status == "diverged"})
        if rates:
            parts.append(f"{label} at {', '.join(map(rate_text, rates))}")
    if parts:
        yield f"Runs diverged of these labels at these learning rates: {'; '.join(parts)}."
