"""The tables of differences from the baseline: at best rates, at equal rates, and how many seeds would tell them."""

from collections.abc import Sequence

from hybridnorm_jax.lab.groups import RunGroup
from hybridnorm_jax.lab.report.blocks import Cell, Column, Table
from hybridnorm_jax.lab.report.columns import LABEL, RATE, numbers, shown
from hybridnorm_jax.lab.report.formats import (
    NONE,
    count_or_more_text,
    interval_text,
    loss_text,
    p_text,
    rate_text,
    signed_text,
)
from hybridnorm_jax.lab.report.significance import LEVEL, MOST_SEEDS, holm, seeds_to_tell, told_difference
from hybridnorm_jax.lab.report.statistics import ComparedRuns, Difference

# The difference of losses, in nats, that the power table asks the seeds for.
ASKED_DIFFERENCE = 0.01
COLUMNS = (*numbers("seeds", "difference", "95 % interval", "p", "p (Holm)"), Column("reading"))


def corrected(found: Sequence[Difference | None]) -> list[float | None]:
    """Each difference's p-value after Holm's correction for all of them; None where there is no p-value."""
    tested = [index for index, each in enumerate(found) if each is not None and each.inference is not None]
    values: list[float | None] = [None] * len(found)
    for index, p in zip(tested, holm([found[index].inference.p for index in tested]), strict=True):
        values[index] = p
    return values


def reading(found: Difference | None, corrected_p: float | None) -> str:
    """What may be read from a difference, in words."""
    if found is None:
        return "no seed can be paired"
    if found.inference is None or corrected_p is None:
        return "one seed: no interval, so it may be chance"
    if corrected_p < LEVEL:
        return "better" if found.mean < 0 else "worse"
    if found.inference.p < LEVEL:
        return "not told apart after Holm's correction"
    return "not told apart: the interval contains 0"


def difference_cells(found: Sequence[Difference | None]) -> list[list[Cell]]:
    """The cells of COLUMNS for each of the differences of one table, whose p-values are corrected together."""
    return [_cells(each, p) for each, p in zip(found, corrected(found), strict=True)]


def _cells(found: Difference | None, corrected_p: float | None) -> list[Cell]:
    text = Cell(reading(found, corrected_p))
    if found is None:
        return [Cell("0", value=0), *[Cell(NONE)] * 4, text]
    count = len(found.seeds)
    of_all = f"{count} of {count + found.left_out}" if found.left_out else f"{count}"
    cells = [Cell(of_all, value=count), shown(found.mean, signed_text)]
    if found.inference is None:
        return [*cells, Cell(NONE), Cell(NONE), Cell(NONE), text]
    interval = Cell(interval_text(found.inference.interval), value=tuple(found.inference.interval))
    return [*cells, interval, shown(found.inference.p, p_text), shown(corrected_p, p_text), text]


def best_rates_table(compared: ComparedRuns) -> Table | None:
    """Differences, each label at its own best learning rate; None where there is nothing to compare."""
    labels = [
        label
        for label, baseline in compared.baselines.items()
        if compared.best_group(label) is not None and _has_losses(compared.best_group(baseline))
    ]
    if not labels:
        return None
    cells = difference_cells([compared.best_differences[label] for label in labels])
    rows = [
        [
            label,
            *_baseline_cells(compared, label),
            shown(compared.best[label], rate_text),
            shown(compared.best[compared.baselines[label]], rate_text),
            shown(compared.best_group(label).mean, loss_text),
            *of_label,
        ]
        for label, of_label in zip(labels, cells, strict=True)
    ]
    return Table(
        "differences-at-best-rates",
        f"Loss minus {_whose(compared)}, each at its own best learning rate; below 0 is better",
        [LABEL, *_baseline_columns(compared), *numbers("its rate", "baseline's rate", "mean loss"), *COLUMNS],
        rows,
    )


def _has_losses(group: RunGroup | None) -> bool:
    return group is not None and bool(group.losses)


def _whose(compared: ComparedRuns) -> str:
    return f"{compared.baseline}'s" if compared.has_one_baseline else "that of its baseline"


def _baseline_columns(compared: ComparedRuns) -> list[Column]:
    """Where labels have different baselines, a column names them."""
    return [] if compared.has_one_baseline else [Column("baseline")]


def _baseline_cells(compared: ComparedRuns, label: str) -> list[str]:
    return [] if compared.has_one_baseline else [compared.baselines[label]]


def equal_rates_table(compared: ComparedRuns) -> Table | None:
    """Differences at the same learning rate; None where no label shares one with the baseline."""
    shared = [
        (label, rate)
        for label, baseline in compared.baselines.items()
        for rate in compared.compared_at(label)
        if (baseline, rate) in compared.groups
    ]
    if not shared:
        return None
    cells = difference_cells([compared.difference(label, rate, rate) for label, rate in shared])
    rows = [
        [label, *_baseline_cells(compared, label), shown(rate, rate_text), *of_pair]
        for (label, rate), of_pair in zip(shared, cells, strict=True)
    ]
    caption = f"Loss minus {_whose(compared)} at the same learning rate and seed; below 0 is better"
    return Table("differences-at-equal-rates", caption, [LABEL, *_baseline_columns(compared), RATE, *COLUMNS], rows)


def power_table(compared: ComparedRuns) -> Table | None:
    """How many seeds a difference would need, and which one these seeds tell; None without two paired seeds."""
    rows = []
    for label, found in compared.best_differences.items():
        if found is not None and found.deviation is not None:
            count = len(found.seeds)
            needed = seeds_to_tell(ASKED_DIFFERENCE, found.deviation)
            rows.append(
                [
                    label,
                    shown(count, str),
                    shown(found.deviation, loss_text),
                    Cell(count_or_more_text(needed, MOST_SEEDS), value=needed),
                    shown(told_difference(found.deviation, count), loss_text),
                ]
            )
    if not rows:
        return None
    return Table(
        "power",
        "What the number of seeds can tell, with a probability of 80 % and at a level of 5 % for one comparison",
        [
            LABEL,
            *numbers("seeds", "std. dev. of the differences", f"seeds to tell {ASKED_DIFFERENCE} nats"),
            *numbers("nats these seeds tell"),
        ],
        rows,
    )
