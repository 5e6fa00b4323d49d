"""How a report begins: the protocol, the best losses, and what can be concluded from them."""

from collections.abc import Iterator

from hybridnorm_jax.lab.groups import TRAINING
from hybridnorm_jax.lab.report import difference_tables, tables
from hybridnorm_jax.lab.report.blocks import Block, Heading, Paragraph, Picture
from hybridnorm_jax.lab.report.comparison_figures import best_losses_figure
from hybridnorm_jax.lab.report.conclusions import conclusions, edges
from hybridnorm_jax.lab.report.facts import budget_text, has_one_data_order
from hybridnorm_jax.lab.report.formats import rate_text
from hybridnorm_jax.lab.report.significance import MOST_FOR_STUDENT, deviation_range
from hybridnorm_jax.lab.report.statistics import ComparedRuns
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED, UNFINISHED

# With more labels than that the first sentence does not name them; the tables do.
MOST_NAMED = 8


def opening_blocks(compared: ComparedRuns) -> Iterator[Block]:
    """The sections before any detail."""
    yield from _protocol(compared)
    yield from _best_losses(compared)
    yield Heading("What can be concluded")
    yield Paragraph(" ".join(conclusions(compared)))
    yield from _power(compared)
    if any(found is not None for found in compared.best_differences.values()):
        yield Heading("How differences are made", level=3)
        yield Paragraph(_difference_sentences(compared))


def _protocol(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Protocol")
    labels = compared.labels
    named = f" ({', '.join(labels)})" if len(labels) <= MOST_NAMED else ""
    what = f"{len(labels)} labels{named} were" if len(labels) > 1 else f"The label {labels[0]} was"
    seeds = len({run.seed for run in compared.runs} - compared.sweep_seeds)
    with_seeds = f"{seeds} seed{'' if seeds == 1 else 's'}"
    yield Paragraph(
        f"{what} trained on the same data for {budget_text(compared)} with {with_seeds} each; the baseline is "
        f"{compared.baseline}. {_rate_sentence(compared)} {_measured_sentence(compared)}"
    )
    statuses = [run.status for run in compared.runs]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in (FINISHED, DIVERGED, UNFINISHED))
    yield Paragraph(f"There are {len(compared.runs)} runs: {counts}.")
    unfinished = [run.name for run in compared.runs if run.status == UNFINISHED]
    if unfinished:
        yield Paragraph(f"No number of this report includes the runs that are unfinished: {', '.join(unfinished)}.")


def _rate_sentence(compared: ComparedRuns) -> str:
    """How the learning rate of each label was found, in one sentence."""
    if compared.sweep_seeds:
        return (
            f"Each label has its own best learning rate, found by a sweep with {_seeds_text(compared)} only, so that "
            "the choice favors no label in the losses of the other seeds, which are compared."
        )
    tried = {len(compared.tried(label)) for label in compared.labels}
    if tried == {1}:
        rates = {rate for label in compared.labels for rate in compared.tried(label)}
        one = f"{rate_text(next(iter(rates)))} for all labels" if len(rates) == 1 else "one for each label"
        return f"Only one learning rate was tried, {one}, which may favor the labels that it happens to suit."
    counts = " to ".join(str(count) for count in (min(tried), max(tried))) if len(tried) > 1 else str(max(tried))
    return (
        f"Each label has the best of {counts} learning rates, chosen by the losses that are compared, which favors "
        "every label a little."
    )


def _seeds_text(compared: ComparedRuns) -> str:
    seeds = sorted(compared.sweep_seeds)
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def _measured_sentence(compared: ComparedRuns) -> str:
    if compared.measured == TRAINING:
        what = "There is no validation set: the report compares the mean training loss of the last steps of a run"
    else:
        what = f"The report compares the loss on the set {compared.measured!r} after the last step"
    return (
        f"{what}, in nats per token (smaller is better), as differences paired by seed with 95 % intervals and "
        "p-values after Holm's correction."
    )


def _best_losses(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Best loss of each label")
    if any(group.losses for group in compared.groups.values()):
        yield Picture(
            "best-losses",
            best_losses_figure(compared),
            "Left: loss at each label's best learning rate. Right: its difference from the baseline with the same "
            "seed. A large marker is the mean, the bar its 95 % interval, a dot one seed. The right panel decides: "
            "what a seed does to both runs alike is gone from it.",
        )
    yield tables.best_losses_table(compared)
    table = difference_tables.best_rates_table(compared)
    if table is None:
        yield Paragraph("Nothing can be compared: the baseline, or every other label, has no finished run.")
    else:
        yield table
    yield Paragraph(_choice_sentences(compared))


def _choice_sentences(compared: ComparedRuns) -> str:
    """How the best rates were chosen, and which of them lie at the edge of what was tried."""
    text = (
        "The best learning rate of a label has the lowest mean loss of those at which the most seeds finished and, "
        "among these, the fewest runs diverged."
    )
    if len({len(compared.tried(label)) for label in compared.labels}) > 1 and not compared.sweep_seeds:
        text += " A label for which more rates were tried is favored more."
    at_edge = edges(compared)
    if at_edge:
        named = "; ".join(f"{label} ({end}, {rate_text(compared.best[label])})" for label, end in at_edge.items())
        text += (
            " The best rate of these labels is the smallest or largest that was tried, so a better one may lie beyond "
            f"it: {named}."
        )
    return text


def _difference_sentences(compared: ComparedRuns) -> str:
    """How differences, intervals and p-values are made, and what they do not say."""
    return (
        "The difference is the mean over seeds of the label's loss minus the baseline's loss with the same seed. "
        f"{_pairing_sentence(compared)} A seed is left out whose two runs did not read the data in the same order, "
        "or recorded that they began with other numbers or read other tokens. "
        f"{_method_sentence(compared)} The interval says how far other seeds might move the difference, on this "
        "data and at this size. Where the true difference is 0, about one interval in 20 misses it by chance; Holm's "
        "p is corrected for all comparisons of its table, so that any false finding among them has a probability of "
        "at most 5 %. A seed counts only if it finished on both sides, which favors a label that diverges."
    )


def _method_sentence(compared: ComparedRuns) -> str:
    """How intervals and p-values are computed for the numbers of seeds that there are."""
    student = "The 95 % interval and p are Student's, with n - 1 degrees of freedom for n seeds."
    bootstrap = (
        "The 95 % interval and p are those of a bootstrap of t (9,999 resamples), because there are more than "
        f"{MOST_FOR_STUDENT} seeds."
    )
    counts = [len(group.losses) for group in compared.groups.values()]
    few, many = min(counts, default=0) <= MOST_FOR_STUDENT, max(counts, default=0) > MOST_FOR_STUDENT
    if few and many:
        return (
            f"Up to {MOST_FOR_STUDENT} seeds the 95 % interval and p are Student's, with n - 1 degrees of freedom for "
            "n seeds; above, those of a bootstrap of t (9,999 resamples)."
        )
    return bootstrap if many else student


def _pairing_sentence(compared: ComparedRuns) -> str:
    """What two runs of one seed have in common, and what all runs have."""
    drawn = (
        "Two runs of one seed draw the same numbers for every parameter that both have in the same shape, up to the "
        "factor of the initializer, and for dropout"
    )
    if has_one_data_order(compared):
        return (
            f"{drawn}. The order of the data is the same for all seeds: it does not add to the differences, and the "
            "interval does not say what another order would do."
        )
    return f"{drawn}, and read the data in the same order."


def _power(compared: ComparedRuns) -> Iterator[Block]:
    table = difference_tables.power_table(compared)
    if table is None:
        return
    yield table
    counts = sorted({len(found.seeds) for found in compared.best_differences.values() if found and found.deviation})
    text = (
        "This is the power of a paired t-test, two-sided, from the standard deviation of the paired differences. The "
        "last column is the true difference that this many seeds would have found with a probability of 80 %."
    )
    if counts:
        low, high = deviation_range(counts[0])
        text += (
            f" The standard deviation itself is an estimate: with {counts[0]} seeds the true one may be {low:.2f} to "
            f"{high:.2f} times as large."
        )
    yield Paragraph(text)
