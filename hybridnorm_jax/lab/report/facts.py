"""What all runs of a comparison share: hardware, data, sizes and settings, with every value that occurs."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from hybridnorm_jax.config_fields import spelled
from hybridnorm_jax.lab.report.formats import digits_text, duration_text, operations_text
from hybridnorm_jax.lab.report.statistics import ComparedRuns, median
from hybridnorm_jax.lab.runs import Run

MODEL_KEYS = ("d_model", "num_layers", "num_heads", "mlp_dim", "norm", "dtype")
OPTIMIZER_KEYS = (
    "name",
    "schedule",
    "final_ratio",
    "warmup_steps",
    "warmup_tokens",
    "b1",
    "b2",
    "weight_decay",
    "clip",
)


class Fact(NamedTuple):
    """A property of the runs and its value."""

    name: str
    text: str


def facts(compared: ComparedRuns) -> list[Fact]:
    """What is known of the runs, in the order of a report."""
    every = [*_machine_facts(compared), *_data_facts(compared), *_time_facts(compared), *_setting_facts(compared)]
    return [fact for fact in every if fact.text]


def has_one_data_order(compared: ComparedRuns) -> bool:
    """Whether all runs read the data in the same order, whatever their seed."""
    data_seeds = {run.config.train.data_seed for run in compared.runs}
    return len(data_seeds) == 1 and None not in data_seeds


def budget_text(compared: ComparedRuns) -> str:
    """How long every run is, as `hybridnorm lab compare` was asked for it."""
    flops = compared.made_by.get("flops")
    if flops is not None:
        return f"{operations_text(flops)} arithmetic operations"
    train, config = compared.runs[0].config.train, compared.runs[0].config
    return f"{train.steps * config.tokens_per_step:,} tokens ({train.steps:,} steps)"


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values that occur, in their order, without None and empty text."""
    return list(dict.fromkeys(value for value in values if value is not None and value != ""))


def _machine_facts(compared: ComparedRuns) -> Iterator[Fact]:
    results = [run.result for run in compared.runs]
    hardware = distinct(result.get("hardware") for result in results)
    yield Fact("hardware", "; ".join(hardware) or "not recorded")
    versions = [
        ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items()) for result in results
    ]
    yield Fact("versions", "; ".join(distinct(versions)) or "not recorded")


def _data_facts(compared: ComparedRuns) -> Iterator[Fact]:
    config = compared.runs[0].config
    data, train = config.data, config.train
    for name, section in data.sources.items():
        files = f": {', '.join(section.files)}" if section.files else ""
        yield Fact(f"source {name}" if name else "data", f"{section.source}{files}")
    if data.mixture:
        stages = data.mixture_stages(train.steps)
        shares = "; ".join(
            f"after step {stage.step:,}: " + ", ".join(f"{name} {share:.2%}" for name, share in stage.weights.items())
            for stage in stages
        )
        yield Fact(f"mixture, in {data.mixture_unit}", shares)
    yield Fact("tokenizer", f"{data.tokenizer}, {config.model.vocab_size:,} rows of the embedding")
    sets = "".join(f", set {name}" for name in data.validation)
    yield Fact("held out", f"{data.validation_fraction:.2%} of the documents{sets}")
    steps = _distinct_steps(compared)
    tokens = " or ".join(f"{count * config.tokens_per_step:,}" for count in steps)
    sizes = distinct(run.result.get("train_tokens") for run in compared.runs)
    if sizes:
        size = sizes[0]
        passes = " or ".join(digits_text(count * config.tokens_per_step / max(size, 1)) for count in steps)
        yield Fact("training set", f"{size:,} tokens, seen {passes} times")
    counts = " or ".join(f"{count:,}" for count in steps)
    shape = f"{counts} steps of {train.batch_size} sequences of {train.seq_len} tokens"
    yield Fact("tokens per run", f"{tokens} ({shape})")
    flops = compared.made_by.get("flops")
    if flops is not None:
        yield Fact("operations per run", f"{operations_text(flops)} for every run, which decides its steps")


def _distinct_steps(compared: ComparedRuns) -> list[int]:
    """The numbers of steps that occur, or only the smallest and the largest where there are many."""
    steps = sorted({run.config.train.steps for run in compared.runs})
    return steps if len(steps) < 4 else [steps[0], steps[-1]]


def _time_facts(compared: ComparedRuns) -> Iterator[Fact]:
    timed = [run.result for run in compared.runs if "seconds" in run.result]
    seconds = [result["seconds"] for result in timed]
    if not seconds:
        return
    parts = [f"{duration_text(sum(seconds))} in all", f"{duration_text(median(seconds))} per run (median)"]
    counted = [result for result in timed if result.get("compile_seconds") is not None]
    whole = sum(result["seconds"] for result in counted)
    if whole:
        parts.append(f"{sum(result['compile_seconds'] for result in counted) / whole:.1%} of it compiling")
    any_resumed = any(run.result.get("resumed_from") for run in compared.runs)
    resumed = "; of a resumed run only the last part is counted" if any_resumed else ""
    yield Fact("wall time", f"{', '.join(parts)}{resumed}")


def _setting_facts(compared: ComparedRuns) -> Iterator[Fact]:
    if has_one_data_order(compared):
        yield Fact(
            "the seed decides",
            "parameters and dropout. All runs read the data in the same order, so this comparison does not show what "
            "another order would do",
        )
    else:
        yield Fact("the seed decides", "parameters, dropout and the order of the data")
    yield Fact("model", _values(compared.runs, "model", MODEL_KEYS))
    yield Fact("optimizer", _values(compared.runs, "optimizer", OPTIMIZER_KEYS))


def _values(runs: Iterable[Run], section: str, names: Iterable[str]) -> str:
    """key=value for each key of a section; where runs differ, key=value or value."""
    sections = [getattr(run.config, section) for run in runs]
    parts = []
    for name in names:
        values = distinct(getattr(values_of_run, name) for values_of_run in sections)
        parts.append(f"{name}={' or '.join(map(spelled, values))}")
    return ", ".join(parts)
