"""The sections of a report, in their order: what its sentences say, and which tables and figures stand between them."""

from collections.abc import Iterator

from hybridnorm_jax.lab.divergence import RISE
from hybridnorm_jax.lab.groups import TRAINING, smoothing_window
from hybridnorm_jax.lab.report import costs, difference_tables, scaling, tables
from hybridnorm_jax.lab.report.blocks import Block, Command, Heading, Listing, Paragraph, Picture
from hybridnorm_jax.lab.report.comparison_figures import operations_figure, scaling_figure
from hybridnorm_jax.lab.report.facts import distinct, has_one_data_order
from hybridnorm_jax.lab.report.formats import rate_text
from hybridnorm_jax.lab.report.layer_figures import QUANTITIES, layer_figure
from hybridnorm_jax.lab.report.loss_figures import loss_curves, rate_curves
from hybridnorm_jax.lab.report.sensitivity import sensitivity_table
from hybridnorm_jax.lab.report.significance import MOST_FOR_STUDENT, deviation_range
from hybridnorm_jax.lab.report.statistics import ComparedRuns
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED, UNFINISHED
from hybridnorm_jax.lab.runs import Run

# More columns of curves are too small to be read on a phone.
RATES_PER_FIGURE = 2


def report_blocks(compared: ComparedRuns) -> list[Block]:
    """The whole report."""
    return [
        *_summary(compared),
        *_what_was_compared(compared),
        *_final_losses(compared),
        *_differences(compared),
        *_stability(compared),
        *_scaling(compared),
        *_loss_curves(compared),
        *_equal_operations(compared),
        *_spikes(compared),
        *_speed(compared),
        *_layers(compared),
        *_runs(compared),
    ]


def _summary(compared: ComparedRuns) -> Iterator[Block]:
    statuses = [run.status for run in compared.runs]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in (FINISHED, DIVERGED, UNFINISHED))
    yield Heading("Summary")
    yield Paragraph(
        f"There are {len(compared.runs)} runs of {len(compared.labels)} labels: {counts}. The baseline is "
        f"{compared.baseline}. {_measured_sentence(compared)}"
    )
    unfinished = [run.name for run in compared.runs if run.status == UNFINISHED]
    if unfinished:
        yield Paragraph(f"No number of this report includes the runs that are unfinished: {', '.join(unfinished)}.")
    table = difference_tables.best_rates_table(compared)
    if table is None:
        yield Paragraph("Nothing can be compared: the baseline, or every other label, has no finished run.")
        return
    yield table
    yield Paragraph(f"{_choice_sentences(compared)}{_edge_sentence(compared)}")
    yield from _power(compared)


def _choice_sentences(compared: ComparedRuns) -> str:
    """How the best rates were chosen, and whom that favors."""
    rule = (
        "The best learning rate of a label has the lowest mean loss of those at which the most seeds finished and, "
        "among these, the fewest runs diverged."
    )
    if not compared.sweep_seeds:
        return (
            f"{rule} It was chosen by the losses that this report shows, which favors every label a little. A label "
            "for which more rates were tried is favored more."
        )
    seeds = sorted(compared.sweep_seeds)
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    return (
        f"{rule} It was chosen with {named} only, and all losses and differences are those of the other seeds, so the "
        "choice favors no label."
    )


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


def _measured_sentence(compared: ComparedRuns) -> str:
    if compared.measured == TRAINING:
        return "There is no validation set: the report compares the mean training loss of the last steps of a run."
    return (
        f"The report compares the loss on the set {compared.measured!r} after the last step, in nats per token. "
        "Smaller is better."
    )


def _edge_sentence(compared: ComparedRuns) -> str:
    at_edge = []
    for label in compared.labels:
        best, tried = compared.best[label], compared.tried(label)
        if len(tried) > 1 and best == tried[0]:
            at_edge.append(f"{label} (smallest, {rate_text(best)})")
        elif len(tried) > 1 and best == tried[-1]:
            at_edge.append(f"{label} (largest, {rate_text(best)})")
    if not at_edge:
        return ""
    return (
        " The best rate of these labels is the smallest or largest that was tried, so a better one may lie beyond it: "
        f"{'; '.join(at_edge)}."
    )


def _what_was_compared(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("What was compared")
    commands = compared.made_by.get("commands")
    if commands:
        yield Listing([Command("Command", str(command)) for command in commands])
    yield tables.facts_table(compared)
    yield tables.labels_table(compared)


def _final_losses(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Final loss")
    yield tables.final_losses_table(compared)
    other_sets = tables.other_sets_table(compared)
    if other_sets is not None:
        yield other_sets


def _differences(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Differences from the baseline")
    table = difference_tables.equal_rates_table(compared)
    if table is None:
        yield Paragraph("No other label was trained at a learning rate of the baseline.")
    else:
        yield table
    yield Paragraph(
        "The difference is the mean over seeds of the label's loss minus the baseline's loss with the same seed. "
        f"{_pairing_sentence(compared)} Seeds that did not read the data in the same order on both sides are left "
        f"out. {_method_sentence(compared)} The interval says how far other seeds might move the difference, on this "
        "data and at this size. Where the true difference is 0, about one interval in 20 misses it by chance; Holm's "
        "p is corrected for all comparisons of its table, so that any false finding among them has a probability of "
        "at most 5 %. A seed counts only if it finished on both sides, which favors a label that diverges."
    )


def _method_sentence(compared: ComparedRuns) -> str:
    """How intervals and p-values are computed for the numbers of seeds that there are."""
    student = "The 95 % interval and p are Student's, with n - 1 degrees of freedom for n seeds."
    bootstrap = (
        "The 95 % interval and p are those of a bootstrap (BCa, 9,999 resamples), because there are more than "
        f"{MOST_FOR_STUDENT} seeds."
    )
    counts = [len(group.losses) for group in compared.groups.values()]
    few, many = min(counts, default=0) <= MOST_FOR_STUDENT, max(counts, default=0) > MOST_FOR_STUDENT
    if few and many:
        return (
            f"Up to {MOST_FOR_STUDENT} seeds the 95 % interval and p are Student's, with n - 1 degrees of freedom for "
            "n seeds; above, those of a bootstrap (BCa, 9,999 resamples)."
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


def _stability(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Stability")
    yield tables.stability_table(compared)
    yield Paragraph(
        "A run diverged if it was stopped because too many steps in a row were skipped (NaN, infinity or spikes), if "
        "its final loss is not finite, or if its loss rose for good. To find such a rise, means are taken over a "
        f"tenth of the steps: the last mean, and the median of its steps, lie more than {RISE} nats above the lowest "
        "mean. The step in the table is then the last one of the lowest mean."
    )
    sensitivity = sensitivity_table(compared)
    if sensitivity is not None:
        yield sensitivity
        yield Paragraph(
            "An increase is the mean over the seeds that finished at both rates. Where no rate was tried at a multiple "
            "of the best one, the nearest within a factor of 1.41 stands for it, and the cell names it."
        )
    groups = compared.choosing_groups
    if len({rate for _, rate in groups}) > 1 and any(group.losses for group in groups.values()):
        yield Picture(
            "learning-rates",
            rate_curves(groups),
            "Final loss by peak learning rate. Lines go through the means of the seeds that finished; each dot is one "
            "seed.",
        )


def _scaling(compared: ComparedRuns) -> Iterator[Block]:
    found = scaling.families(compared)
    if not found:
        return
    yield Heading("Scaling")
    yield scaling.sizes_table(found)
    slopes = scaling.slopes_table(found)
    if slopes is not None:
        yield slopes
        yield Paragraph(
            "b is the change of the loss for each doubling of the parameters; below 0 a larger model is better. The "
            "standard error supposes a straight line, and the same number of tokens or operations for all sizes says "
            "nothing about models that are trained to the end."
        )
    unfitted = [family.name for family in found if family.line is None]
    if unfitted:
        yield Paragraph(
            f"No slope is fitted for {', '.join(unfitted)}: fewer than {scaling.FEWEST_SIZES} sizes have a run that "
            "finished, and a line through two points cannot be wrong."
        )
    yield Picture(
        "scaling",
        scaling_figure(found),
        "Final loss by size, each size at its own best learning rate. Large markers are means, dots are seeds, lines "
        "are the fits.",
    )


def _equal_operations(compared: ComparedRuns) -> Iterator[Block]:
    table = costs.equal_operations_table(compared)
    if table is None:
        return
    yield Heading("Equal operations")
    yield table
    text = (
        "Operations are those of a training step, counted in its program before compilation. The loss there is "
        "interpolated between evaluations, as a straight line."
    )
    if compared.made_by.get("flops") is None:
        text += (
            " All runs have the same number of steps, so for a costlier label this point lies before the end of its "
            "schedule, where the learning rate has not yet fallen as far: this favors the cheapest label. For a fair "
            "comparison give all runs the same budget, `hybridnorm lab compare flops=N`."
        )
    else:
        text += " Every run was given this number of operations, so each label is at the end of its own schedule."
    yield Paragraph(text)
    yield Picture(
        "operations",
        operations_figure(costs.loss_over_operations(compared)),
        f"Loss ({compared.measured}) over arithmetic operations, means over seeds, each label at its own best "
        "learning rate.",
    )


def _loss_curves(compared: ComparedRuns) -> Iterator[Block]:
    runs = [run for run in compared.ended if run.losses]
    if not runs:
        return
    yield Heading("Loss curves")
    window = smoothing_window(runs[0])
    smoothing = f"the mean of the last {window:,} steps, then the mean over" if window > 1 else "the mean over"
    markers = "" if compared.measured == TRAINING else f" Large open markers are the loss on {compared.measured}."
    caption = (
        f"Training loss: {smoothing} the seeds that finished.{markers} Each thin line is one run that diverged, up to "
        "its end. Below is the second half of training, on a scale of its own."
    )
    rates = sorted({run.rate for run in runs})
    for first in range(0, len(rates), RATES_PER_FIGURE):
        part = rates[first : first + RATES_PER_FIGURE]
        figure = loss_curves([run for run in runs if run.rate in part], part, compared.measured)
        yield Picture(f"loss-{first // RATES_PER_FIGURE + 1}", figure, caption)


def _spikes(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Loss spikes and gradient norms")
    yield tables.spikes_table(compared)
    yield Paragraph(
        "The spike score (OLMo 2, arXiv 2501.00656) is the percentage of values that lie at least 7 standard "
        "deviations from the mean of the last 1,000 values. A value that is not finite counts as a spike. Runs that "
        "diverged are included up to their end. Gradient norms are those before clipping."
    )
    recorded = sum(len(run.losses) for run in compared.ended)
    made = sum(run.step or 0 for run in compared.ended)
    if recorded < 0.9 * made:
        yield Paragraph("Some runs recorded only every train.log_every-th step: their scores may miss spikes.")


def _speed(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Throughput")
    if not compared.shows_speed:
        yield Paragraph(
            "This report shows no throughput. The runs of a comparison may have been made one after another, beside "
            "other work or on different machines, and then their tokens per second say more about that than about the "
            "labels. `hybridnorm lab report DIR --speed` shows them nevertheless."
        )
        return
    yield tables.speed_table(compared)
    sentences = (
        "Tokens of a step, divided by the median time of the steps that only trained, over all steps of the runs that "
        "finished. Left out are the first step, compilation, evaluation, checkpoints, measurements of the layers, "
        "profiles and skipped steps. The wait for input is included. What else the machine did meanwhile is not known."
    )
    if len(distinct(run.result.get("hardware") for run in compared.runs)) > 1:
        sentences += " The runs were made on different hardware, so the ratios say little about the labels."
    yield Paragraph(sentences)


def _layers(compared: ComparedRuns) -> Iterator[Block]:
    rates = {label: _shown_rate(compared, label) for label in compared.labels}
    watched = {label: _shown_runs(compared, label, rate) for label, rate in rates.items()}
    watched = {label: runs for label, runs in watched.items() if runs}
    figures = [(quantity, layer_figure(quantity, watched)) for quantity in QUANTITIES]
    if all(figure is None for _, figure in figures):
        return
    yield Heading("Layers")
    shown_at = "; ".join(f"{label} at {rate_text(rates[label])}" for label in watched)
    diverged = [label for label, runs in watched.items() if all(run.status == DIVERGED for run in runs)]
    text = (
        f"Lines are means over seeds, each label at its best learning rate ({shown_at}). The steps are those of "
        "train.watch_every."
    )
    if diverged:
        text += f" Labels that diverged are shown up to there: {', '.join(diverged)}."
    yield Paragraph(text)
    for quantity, figure in figures:
        if figure is not None:
            yield Picture(quantity.name, figure, f"{quantity.meaning}.")


def _shown_rate(compared: ComparedRuns, label: str) -> float:
    """The best learning rate of a label, or the smallest where no run of it finished."""
    best = compared.best[label]
    return compared.tried(label)[0] if best is None else best


def _shown_runs(compared: ComparedRuns, label: str, rate: float) -> list[Run]:
    """The watched runs that finished, or those that diverged: their last watched step is another one."""
    runs = compared.final_runs(label) or compared.ended_runs(label, rate)
    watched = [run for run in runs if run.watched]
    return [run for run in watched if run.status == FINISHED] or watched


def _runs(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Runs")
    yield tables.runs_table(compared)
    yield Heading("Commands", level=3)
    unknown = "not recorded; the run's config.yaml is its whole configuration"
    yield Listing([Command(run.name, run.result.get("command") or unknown) for run in compared.runs])
