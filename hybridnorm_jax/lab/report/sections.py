"""The sections of a report in their order, and those that show single runs: curves, layers, spikes, commands."""

from collections.abc import Iterator

from hybridnorm_jax.lab.groups import TRAINING, smoothing_window
from hybridnorm_jax.lab.report import comparison_sections, tables
from hybridnorm_jax.lab.report.blocks import Block, Command, Heading, Listing, Paragraph, Picture
from hybridnorm_jax.lab.report.facts import distinct
from hybridnorm_jax.lab.report.formats import rate_text
from hybridnorm_jax.lab.report.layer_figures import QUANTITIES, layer_figure
from hybridnorm_jax.lab.report.loss_figures import best_rate_curves, loss_curves
from hybridnorm_jax.lab.report.opening_sections import opening_blocks
from hybridnorm_jax.lab.report.statistics import ComparedRuns
from hybridnorm_jax.lab.run_files import DIVERGED, FINISHED
from hybridnorm_jax.lab.runs import Run

# More columns of curves are too small to be read on a phone.
RATES_PER_FIGURE = 2


def report_blocks(compared: ComparedRuns) -> list[Block]:
    """The whole report."""
    return [
        *opening_blocks(compared),
        *comparison_sections.learning_rates(compared),
        *comparison_sections.stability(compared),
        *_loss_curves(compared),
        *_layers(compared),
        *comparison_sections.equal_operations(compared),
        *comparison_sections.sizes(compared),
        *_final_losses(compared),
        *comparison_sections.equal_rates(compared),
        *_spikes(compared),
        *_speed(compared),
        *_commands(compared),
        *_environment(compared),
    ]


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
        "its end. The second half of training has a scale of its own."
    )
    best = [run for label in compared.labels for run in compared.final_runs(label) if run.losses]
    if best:
        yield Picture("loss-best", best_rate_curves(best, compared.measured), f"At each label's best rate. {caption}")
    rates = sorted({run.rate for run in runs})
    if compared.sweep_seeds or len(rates) < 2:
        return
    for first in range(0, len(rates), RATES_PER_FIGURE):
        part = rates[first : first + RATES_PER_FIGURE]
        figure = loss_curves([run for run in runs if run.rate in part], part, compared.measured)
        yield Picture(f"loss-{first // RATES_PER_FIGURE + 1}", figure, caption)


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
    """The best learning rate of a label, or the smallest where no run that chooses it finished."""
    best = compared.best[label]
    return (compared.tried(label) or compared.compared_at(label))[0] if best is None else best


def _shown_runs(compared: ComparedRuns, label: str, rate: float) -> list[Run]:
    """The watched runs that finished, or those that diverged: their last watched step is another one."""
    runs = compared.final_runs(label) or compared.ended_runs(label, rate)
    watched = [run for run in runs if run.watched]
    return [run for run in watched if run.status == FINISHED] or watched


def _final_losses(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Final loss of every seed")
    yield tables.final_losses_table(compared)
    other_sets = tables.other_sets_table(compared)
    if other_sets is not None:
        yield other_sets


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


def _commands(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Commands")
    commands = compared.made_by.get("commands")
    if commands:
        yield Paragraph("The whole comparison, and this page:")
        report = f"hybridnorm lab report {compared.directory}"
        yield Listing([*(Command("Train", str(command)) for command in commands), Command("Report", report)])
    yield Heading("Each run", level=3)
    unknown = "not recorded; the run's config.yaml is its whole configuration"
    yield Listing([Command(run.name, run.result.get("command") or unknown) for run in compared.runs])


def _environment(compared: ComparedRuns) -> Iterator[Block]:
    yield Heading("Environment and settings")
    yield tables.facts_table(compared)
    yield tables.labels_table(compared)
    yield tables.runs_table(compared)
