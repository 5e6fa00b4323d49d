"""The sections of a report: what its tables, figures and sentences say."""

from collections.abc import Callable, Iterable
from typing import Any

from hybridnorm_jax.config.values import show
from hybridnorm_jax.lab import figures, statistics
from hybridnorm_jax.lab.divergence import RISE
from hybridnorm_jax.lab.figures import number
from hybridnorm_jax.lab.page import Block, Cell, Heading, Listing, Paragraph, Picture, Table
from hybridnorm_jax.lab.runs import DIVERGED, FINISHED, UNFINISHED, Run, differing, settings
from hybridnorm_jax.lab.statistics import Comparison

# More columns of curves are too small to be read on a phone.
RATES_PER_FIGURE = 2
NONE = "—"


def blocks(c: Comparison) -> list[Block]:
    """The whole report."""
    sections = (_summary, _compared, _final_losses, _differences, _stability, _curves, _spikes, _speed, _layers, _runs)
    return [block for section in sections for block in section(c)]


def _summary(c: Comparison) -> Iterable[Block]:
    count = {status: sum(run.status == status for run in c.runs) for status in (FINISHED, DIVERGED, UNFINISHED)}
    counts = ", ".join(f"{amount} {status}" for status, amount in count.items())
    yield Heading("Summary")
    yield Paragraph(
        f"{len(c.runs)} runs of {len(c.labels)} labels: {counts}. The baseline is {c.baseline}. {_measure(c)}"
    )
    unfinished = [run.name for run in c.runs if run.status == UNFINISHED]
    if unfinished:
        yield Paragraph(f"Unfinished, and in no number of this report: {', '.join(unfinished)}.")
    yield from _at_best(c)


def _measure(c: Comparison) -> str:
    if c.measured == statistics.TRAINING:
        return "There is no validation set: the loss compared is the mean training loss of the run's last steps."
    return (
        f"The loss compared is that on the set {c.measured!r} after the last step (nats per token; smaller is better)."
    )


def _at_best(c: Comparison) -> Iterable[Block]:
    """Differences, each label at its own best learning rate."""
    base = c.best[c.baseline]
    others = [label for label in c.labels[1:] if c.best[label] is not None]
    if base is None or not others:
        yield Paragraph("No label can be compared with the baseline: one of them, or all others, have no finished run.")
        return
    rows = []
    for label in others:
        rate = c.best[label]
        cells = c.cells[label, rate], c.cells[c.baseline, base]
        rows.append([label, number(rate), number(base), _loss(cells[0].mean), *_difference_words(*cells)])
    caption = f"Loss minus {c.baseline}'s, each at its own best learning rate; below 0 is better"
    columns = (
        "label",
        "#its rate",
        "#baseline's rate",
        "#mean loss",
        "#seeds",
        "#difference",
        "#95 % interval",
        "reading",
    )
    yield Table(caption, columns, rows)
    yield Paragraph(
        "Best is the learning rate with the lowest mean loss, of those with the most finished seeds, then the fewest "
        "diverged. It was chosen by the losses shown here, which favors every label a little, and one with more rates "
        "tried a little more. " + _edges(c)
    )


def _edges(c: Comparison) -> str:
    words = []
    for label in c.labels:
        tried = sorted(rate for name, rate in c.cells if name == label)
        if len(tried) > 1 and c.best[label] in (tried[0], tried[-1]):
            words.append(f"{label} ({'smallest' if c.best[label] == tried[0] else 'largest'}, {number(c.best[label])})")
    return (
        f"The best rate is at the edge of those tried, and a better one may lie beyond it: {'; '.join(words)}."
        if words
        else ""
    )


def _difference_words(ours: statistics.Cell, theirs: statistics.Cell) -> list[str]:
    """Seeds, difference, interval, reading."""
    difference = statistics.paired_difference(ours, theirs)
    if difference is None:
        return ["0", NONE, NONE, "no seed finished on both sides"]
    seeds = f"{len(difference.seeds)}" + (
        f" of {len(difference.seeds) + difference.left_out}" if difference.left_out else ""
    )
    mean, half = difference.mean, difference.half_width
    if half is None:
        return [seeds, _signed(mean), NONE, "one seed: no interval, nothing is known of chance"]
    low, high = mean - half, mean + half
    reading = "better" if high < 0 else "worse" if low > 0 else "not told apart: the interval holds 0"
    return [seeds, _signed(mean), f"{_signed(low)} to {_signed(high)}", reading]


def _compared(c: Comparison) -> Iterable[Block]:
    yield Heading("What was compared")
    if commands := c.made_by.get("commands"):
        yield Listing([("Command", str(command)) for command in commands])
    yield Table("All runs", ("property", "value"), [[name, text] for name, text in _facts(c) if text])
    rows = []
    for label in c.labels:
        config = next(run.config for run in c.runs if run.label == label)
        model, base = config.model, next(run.config for run in c.runs if run.label == c.baseline)
        norms = ["yes" if has else "no" for has in (model.has_embedding_norm, model.has_final_norm)]
        rows.append([label, model.initializer_name, *norms, _differs(config, base) if label != c.baseline else NONE])
    columns = ("label", "initializer", "embedding norm", "final norm", f"differs from {c.baseline} in")
    yield Table("Labels: what a scheme brings with it, and what differs besides seed and learning rate", columns, rows)


def _differs(config: Any, base: Any) -> str:
    ours, theirs = settings(config), settings(base)
    return "; ".join(f"{key}: {show(theirs[key])} → {show(ours[key])}" for key in differing([base, config]))


def _facts(c: Comparison) -> Iterable[tuple[str, str]]:
    """(name, value) of what all runs share, or every value that occurs."""
    results = [run.result for run in c.runs]
    config = c.runs[0].config
    data, train = config.data, config.train
    tokens = train.steps * config.tokens_per_step
    yield "hardware", "; ".join(_distinct(result.get("hardware") for result in results)) or "not recorded"
    versions = [", ".join(f"{name} {version}" for name, version in r.get("versions", {}).items()) for r in results]
    yield "versions", "; ".join(_distinct(versions)) or "not recorded"
    yield "data", f"{data.source}" + (f": {', '.join(data.files)}" if data.files else "")
    yield "tokenizer", f"{data.tokenizer}, {config.model.vocab_size:,} rows of the embedding"
    held_out = f"{data.validation_fraction:.2%} of the documents"
    yield "held out", held_out + "".join(f", set {name}" for name in data.validation)
    known = _distinct(r.get("train_tokens") for r in results)
    if known:
        yield "training set", f"{known[0]:,} tokens, seen {_figure(tokens / max(known[0], 1))} times"
    shape = f"{train.steps:,} steps of {train.batch_size} sequences of {train.seq_len} tokens"
    yield "tokens per run", f"{tokens:,} ({shape})"
    seconds = [r["seconds"] for r in results if "seconds" in r]
    if seconds:
        resumed = ", of resumed runs the last stretch" if any(r.get("resumed_from") for r in results) else ""
        each = f"{_time(statistics.median(seconds))} per run (median)"
        yield "wall time", f"{_time(sum(seconds))} in all, {each}{resumed}"
    orders = {run.config.train.data_seed for run in c.runs}
    own = "parameters, dropout and the order of the data"
    fixed = "parameters and dropout; all runs read the data in one order, and what another would do is not seen"
    yield "a seed decides", fixed if len(orders) == 1 and orders != {None} else own
    names = ("d_model", "num_layers", "num_heads", "mlp_dim", "norm", "dtype")
    yield (
        "model",
        ", ".join(f"{name}={_values(c, lambda run, name=name: getattr(run.config.model, name))}" for name in names),
    )
    names = ("schedule", "final_ratio", "warmup_steps", "warmup_tokens", "b1", "b2", "weight_decay", "clip")
    yield (
        "optimizer",
        ", ".join(f"{name}={_values(c, lambda run, name=name: getattr(run.config.optimizer, name))}" for name in names),
    )


def _values(c: Comparison, read: Callable[[Run], Any]) -> str:
    return " or ".join(map(show, _distinct(read(run) for run in c.runs)))


def _final_losses(c: Comparison) -> Iterable[Block]:
    yield Heading("Final loss")
    seeds = sorted({run.seed for run in c.ended})
    rows = []
    for label in c.labels:
        for rate in c.rates:
            cell = c.cells.get((label, rate))
            if cell is None or not (cell.losses or cell.diverged):
                continue
            each = [
                _loss(cell.losses[s]) if s in cell.losses else "diverged" if s in cell.diverged else NONE for s in seeds
            ]
            counts = [str(len(part)) for part in (cell.losses, cell.diverged, cell.unfinished)]
            rows.append([label, number(rate), _loss(cell.mean), _loss(cell.deviation), *each, *counts])
    columns = ("label", "#learning rate", "#mean", "#std. dev.", *(f"#seed {seed}" for seed in seeds))
    caption = (
        f"Loss ({c.measured}, nats per token; smaller is better); mean and std. dev. (n - 1) of seeds that finished"
    )
    yield Table(caption, (*columns, "#finished", "#diverged", "#unfinished"), rows)
    sets = sorted({name for run in c.ended for name in run.scores} - {c.measured})
    if sets:
        rows = []
        for label, rate in ((label, c.best[label]) for label in c.labels if c.best[label] is not None):
            mine = [run for run in c.of(label, rate) if run.status == FINISHED]
            means = [_mean([run.scores[name] for run in mine if name in run.scores]) for name in sets]
            rows.append([label, number(rate), *map(_loss, means)])
        yield Table(
            "Other sets: mean loss at the best learning rate",
            ("label", "#learning rate", *(f"#{s}" for s in sets)),
            rows,
        )


def _differences(c: Comparison) -> Iterable[Block]:
    yield Heading("Differences from the baseline")
    rows = []
    for label in c.labels[1:]:
        for rate in c.rates:
            if (label, rate) in c.cells and (c.baseline, rate) in c.cells:
                words = _difference_words(c.cells[label, rate], c.cells[c.baseline, rate])
                rows.append([label, number(rate), *words])
    if rows:
        columns = ("label", "#learning rate", "#seeds", "#difference", "#95 % interval", "reading")
        yield Table(f"Loss minus {c.baseline}'s at the same learning rate and seed; below 0 is better", columns, rows)
    else:
        yield Paragraph("No other label has a learning rate in common with the baseline.")
    yield Paragraph(
        "Mean over seeds of the loss minus the baseline's loss of the same seed, with the 95 % interval of Student's t "
        "with n - 1 degrees of freedom for n seeds. It says how far other seeds might move the difference, on these "
        "data and at this size; of 20 intervals around a true 0, one leaves it out by chance. Seeds that did not "
        "finish on both sides are left out, which favors a label that diverges."
    )


def _stability(c: Comparison) -> Iterable[Block]:
    yield Heading("Stability")
    means = sorted({cell.mean for cell in c.cells.values() if cell.mean is not None})
    rows = []
    for label in c.labels:
        row = [_stability_cell(c.cells.get((label, rate)), means) for rate in c.rates]
        rows.append([label, *row])
    columns = ("label", *(f"learning rate {number(rate)}" for rate in c.rates))
    caption = "Mean final loss by label and learning rate: the darker, the larger; framed where a run diverged"
    yield Table(caption, columns, rows)
    yield Paragraph(
        "Diverged: stopped by skipped steps in a row (NaN, infinity, spikes), or ended, in means over a tenth of all, "
        f"more than {RISE} nats above its lowest training loss; the step is then that of the lowest mean."
    )
    if len(c.rates) > 1 and means:
        caption = (
            "Final loss by peak learning rate: lines through the means of the seeds that finished, dots for each seed"
        )
        yield Picture("learning-rates", figures.rate_curves(c.cells), caption + ".")


def _stability_cell(cell: statistics.Cell | None, means: list[float]) -> Cell:
    if cell is None:
        return Cell("not run")
    words = []
    if cell.losses:
        of = f" ({len(cell.losses)} of {len(cell.losses) + len(cell.diverged)})" if cell.diverged else ""
        words.append(_loss(cell.mean) + of)
    if cell.diverged:
        steps = sorted(step for step in cell.diverged.values() if step is not None)
        words.append("diverged" + (f" at step {', '.join(map(str, steps))}" if steps else ""))
    if cell.unfinished:
        words.append("unfinished" + (f": {len(cell.unfinished)}" if words else ""))
    # Ranks: one label that hardly learned would make all others look alike.
    shade = means.index(cell.mean) / max(1, len(means) - 1) if cell.losses else None
    return Cell("; ".join(words), shade, failed=bool(cell.diverged))


def _curves(c: Comparison) -> Iterable[Block]:
    runs = [run for run in c.ended if run.losses]
    if not runs:
        return
    yield Heading("Loss curves")
    rates = sorted({run.rate for run in runs})
    window = statistics.smoothing_window(runs[0])
    smoothing = f"mean of the last {window:,} steps and then over" if window > 1 else "mean over"
    markers = "" if c.measured == statistics.TRAINING else f" Large open markers: loss on {c.measured}."
    caption = (
        f"Training loss, {smoothing} the seeds that finished.{markers} Thin lines: runs that diverged, one by one, up "
        "to where they ended. Below: the second half of training, on a scale of its own."
    )
    for first in range(0, len(rates), RATES_PER_FIGURE):
        part = rates[first : first + RATES_PER_FIGURE]
        figure = figures.loss_curves([run for run in runs if run.rate in part], part, c.measured)
        yield Picture(f"loss-{first // RATES_PER_FIGURE + 1}", figure, caption)


def _spikes(c: Comparison) -> Iterable[Block]:
    yield Heading("Loss spikes and gradient norms")
    rows = []
    for label, rate in ((label, rate) for label in c.labels for rate in c.rates):
        mine = c.of(label, rate)
        if not any(run.losses for run in mine):
            continue
        keys = ("loss_spike_score", "gradient_spike_score")
        scores = [_mean(c.numbers[run.name][key] for run in mine) for key in keys]
        norms = statistics.percentiles([point for run in mine for point in run.gradient_norms])
        counted = f"{sum(len(run.losses) for run in mine):,}"
        rows.append([label, number(rate), counted, *map(_percent, scores), *(_figure(n) for n in norms or [None] * 3)])
    columns = ("label", "#learning rate", "#steps", "#loss spikes", "#norm spikes", "#norm 50 %", "#90 %", "#99 %")
    caption = "Spike scores of loss and gradient norm (mean over runs); percentiles of the norm (all runs together)"
    yield Table(caption, columns, rows)
    yield Paragraph(
        "Spike score (OLMo 2, arXiv 2501.00656): the percentage of values that lie at least 7 standard deviations from "
        "the mean of the last 1,000 values; a value that is not finite counts as one. Runs that diverged are included "
        "up to where they ended. Gradient norms are those before clipping."
    )
    expected = sum(run.step or 0 for run in c.ended)
    if sum(len(run.losses) for run in c.ended) < 0.9 * expected:
        yield Paragraph("Of some runs only every train.log_every-th step was recorded: their scores may miss spikes.")


def _speed(c: Comparison) -> Iterable[Block]:
    yield Heading("Throughput")
    medians = {label: statistics.median([rate for run in c.of(label) for rate in run.rates]) for label in c.labels}
    base = medians[c.baseline]
    rows = [
        [label, _figure(speed), f"{speed / base:.3f}" if base else NONE]
        for label, speed in medians.items()
        if speed is not None
    ]
    yield Table("Tokens per second of training", ("label", "#median", f"#ratio to {c.baseline}"), rows)
    warning = (
        "Medians over the lines of metrics.jsonl of all runs; evaluation, checkpoints and compilation are not in them."
    )
    if len(_distinct(run.result.get("hardware") for run in c.runs)) > 1:
        warning += " The runs were made on different hardware: the ratios say little about the labels."
    yield Paragraph(warning)


def _layers(c: Comparison) -> Iterable[Block]:
    chosen, rates = {}, {}
    for label in c.labels:
        tried = sorted(rate for name, rate in c.cells if name == label)
        rate = tried[0] if c.best[label] is None else c.best[label]
        mine = [run for run in c.of(label, rate) if run.watched]
        # Beside runs that went to the end, one that diverged ends at another step.
        chosen[label] = [run for run in mine if run.status == FINISHED] or mine
        rates[label] = rate
    chosen = {label: runs for label, runs in chosen.items() if runs}
    pictures = [(quantity, figures.layers(quantity, chosen)) for quantity in figures.QUANTITIES] if chosen else []
    if not any(figure for _, figure in pictures):
        return
    yield Heading("Layers")
    diverged = [label for label, runs in chosen.items() if all(run.status == DIVERGED for run in runs)]
    at = "; ".join(f"{label} at {number(rates[label])}" for label in chosen)
    yield Paragraph(
        f"Means over seeds, each label at its best learning rate ({at}). Steps are those of train.watch_every."
        + (f" Diverged, shown up to there: {', '.join(diverged)}." if diverged else "")
    )
    for quantity, figure in pictures:
        if figure is not None:
            yield Picture(quantity.name, figure, f"{quantity.meaning}.")


def _runs(c: Comparison) -> Iterable[Block]:
    yield Heading("Runs")
    rows = []
    for run in c.runs:
        numbers = c.numbers[run.name]
        status = f"diverged at step {run.diverged_at}" if run.diverged_at is not None else run.status
        seconds, resumed = numbers["seconds"], numbers["resumed_from"]
        loss, step = _loss(numbers["final_loss"]), NONE if run.step is None else f"{run.step:,}"
        times = [NONE if seconds is None else _time(seconds), f"step {resumed}" if resumed else NONE]
        rows.append([run.name, run.label, number(run.rate), str(run.seed), status, step, loss, *times])
    columns = ("run", "label", "#learning rate", "#seed", "status", "#steps", "#loss", "#wall time", "resumed from")
    yield Table("Every run; report.csv has all its numbers", columns, rows)
    yield Heading("Commands", 3)
    yield Listing(
        [
            (run.name, run.result.get("command") or "not recorded; config.yaml there is the whole configuration")
            for run in c.runs
        ]
    )


def _distinct(values: Iterable[Any]) -> list[Any]:
    """In the order they come, without what is empty; zeros stay."""
    return list(dict.fromkeys(value for value in values if value not in (None, "")))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _signed(value: float) -> str:
    # A true minus sign is as wide as a plus, so that columns align.
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f} %"


def _figure(value: float | None) -> str:
    """Three digits, or all of those before the point."""
    return NONE if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
