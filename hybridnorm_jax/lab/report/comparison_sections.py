"""The sections that compare labels in one respect each: learning rates, equal rates, equal operations, and size."""

from collections.abc import Iterator

from hybridnorm_jax.lab.divergence import RISE
from hybridnorm_jax.lab.report import costs, difference_tables, scaling, tables
from hybridnorm_jax.lab.report.blocks import Block, Heading, Paragraph, Picture
from hybridnorm_jax.lab.report.comparison_figures import operations_figure, scaling_figure
from hybridnorm_jax.lab.report.loss_figures import rate_curves
from hybridnorm_jax.lab.report.sensitivity import sensitivity_table
from hybridnorm_jax.lab.report.statistics import ComparedRuns


def learning_rates(compared: ComparedRuns) -> Iterator[Block]:
    """Loss by learning rate: curves, and how much each label loses beside its best rate."""
    groups = compared.choosing_groups
    if len({rate for _, rate in groups}) < 2 or not any(group.losses for group in groups.values()):
        return
    yield Heading("Learning rates")
    yield Picture(
        "learning-rates",
        rate_curves(groups),
        "Final loss by peak learning rate. Lines go through the means of the seeds that finished; each dot is one "
        "seed.",
    )
    sensitivity = sensitivity_table(compared)
    if sensitivity is not None:
        yield sensitivity
        yield Paragraph(
            "An increase is the mean over the seeds that finished at both rates. Where no rate was tried at a multiple "
            "of the best one, the nearest within a factor of 1.41 stands for it, and the cell names it."
        )


def stability(compared: ComparedRuns) -> Iterator[Block]:
    """What diverged where."""
    yield Heading("Stability")
    yield tables.stability_table(compared)
    yield Paragraph(
        "A run diverged if it was stopped because too many steps in a row were skipped (NaN, infinity or spikes), if "
        "its final loss is not finite, or if its loss rose for good. To find such a rise, means are taken over a "
        f"tenth of the steps: the last mean, and the median of its steps, lie more than {RISE} nats above the lowest "
        "mean. The step in the table is then the last one of the lowest mean."
    )


def equal_rates(compared: ComparedRuns) -> Iterator[Block]:
    """Differences at the same learning rate, where any two labels share one."""
    table = difference_tables.equal_rates_table(compared)
    if table is None:
        return
    yield Heading("Differences at equal learning rates")
    yield table
    yield Paragraph("Holm's correction is for all comparisons of this table together.")


def equal_operations(compared: ComparedRuns) -> Iterator[Block]:
    """Losses where all labels have spent the same number of arithmetic operations."""
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


def sizes(compared: ComparedRuns) -> Iterator[Block]:
    """Losses by size, where schemes were trained at several."""
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
