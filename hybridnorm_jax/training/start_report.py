"""The block of lines a run begins with."""

import math
import textwrap
from collections.abc import Sequence

import jax

from hybridnorm_jax.config.resume_keys import warmup_steps
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.unread_keys import unread_keys
from hybridnorm_jax.data import Data
from hybridnorm_jax.data.mixture import Mixture
from hybridnorm_jax.mesh.shardings import undivided
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.xla_options import described

WIDTH = 80


def start_report(run: Run) -> str:
    """What will be trained, on what, and where its files go."""
    config, data, mixture = run.config, run.data, run.mixture
    steps, resumed = config.train.steps, run.first
    if resumed >= steps:
        state = f"all {steps:,} steps were made before"
    elif resumed:
        state = f"goes on after step {resumed:,} of {steps:,}"
    else:
        state = f"new, {count_text(steps, 'step')}"
    rows = run_rows(config, run.program, f"{run.directory}: {state}", data.description)
    lines = [table([*rows, *_plan_rows(config, data, mixture)])]
    if mixture is not None:
        lines.append(mixture_table(config, data, mixture))
    return "\n".join(lines)


def mixture_table(config: RunConfig, data: Data, mixture: Mixture) -> str:
    """A line for each source: its tokens, its share of the tokens of every stage, and its epochs in the whole run."""
    stages = mixture.stage_shares()
    head = ["mixture", "tokens", *(f"from {stage.first:,}" for stage in stages), "epochs"]
    at_end = mixture.read_until(config.train.steps)
    lines = [head]
    for name, source in data.sources.items():
        most = config.data.mixture[name].epochs
        lines.append(
            [
                name,
                f"{source.train.num_tokens:,}",
                *(f"{stage.shares[name]:.2%}" for stage in stages),
                f"{at_end[name].epochs:,.2f}" + ("" if most is None else f" of at most {most:g}"),
            ]
        )
    last = len(head) - 1
    widths = [max(len(line[place]) for line in lines) for place in range(last)]
    cells = [
        [line[0].ljust(max(widths[0], 12)), *(line[place].rjust(widths[place]) for place in range(1, last)), line[last]]
        for line in lines
    ]
    note = f"{'':13}(share of the tokens from a step on; weights are of {config.data.mixture_unit})"
    return "\n".join(["  ".join(line) for line in cells] + [note])


def table(rows: Sequence[tuple[str, str]]) -> str:
    """(name, text) pairs as lines of at most 80 columns; what cannot be broken, such as a path, may be longer."""
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"{name:<12} ",
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in rows
    )


def count_text(number: int, noun: str) -> str:
    """1 step, 2 steps, 1,000 batches."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def run_rows(config: RunConfig, program: Program, run: str, data: str) -> list[tuple[str, str]]:
    """(name, text) of all that is known before the first step; `run` and `data` are the texts of these two."""
    model, mesh = config.model, program.mesh
    params = program.abstract_state.params
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    larger = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    rows = [
        ("run", run),
        (
            "devices",
            f"{mesh.size} x {mesh.devices.flat[0].device_kind} in {count_text(jax.process_count(), 'process')}",
        ),
        ("mesh", ", ".join(larger) or "nothing is split: one device"),
        ("model", _shape(config)),
        ("parameters", f"{total:,} in {model.param_dtype}; computes in {model.dtype}"),
    ]
    if model.num_experts:
        rows.append(("experts", _experts(program, total)))
    rows.append(("scheme", _scheme(config)))
    if program.conversion is not None:
        rows.append(("form", _form(program)))
    rows.append(("optimizer", _optimizer(config)))
    if config.optimizer.averages:
        rows.append(("average", _average(config)))
    rows += [
        ("attention", f"{program.backend}{_choice(model.attention, program.backend, 'model.attention')}"),
        ("remat", f"{program.remat}{_choice(model.remat, program.remat, 'model.remat')}"),
        ("step", _step(program)),
        ("data", data),
    ]
    rows += [("note", line) for line in unread_keys(config)]
    compiler = described(program.compiler_options)
    if compiler is not None:
        rows.append(("compiler", compiler))
    return rows + [("sharding", line) for line in undivided(params, mesh, program.rules)]


def _shape(config: RunConfig) -> str:
    model = config.model
    layers, heads = count_text(model.num_layers, "layer"), count_text(model.num_heads, "head")
    return f"{layers} of width {model.d_model:,}, {heads}, vocabulary of {model.vocab_size:,}"


def _scheme(config: RunConfig) -> str:
    """The placement of norms; equal layers in a row are compiled once, so their groups say how long compiling takes."""
    model = config.model
    groups = len(model.runs)
    in_groups = "" if groups == 1 else f"; the layers form {groups} groups of equal ones"
    return f"{model.scheme} with {model.norm}{in_groups}"


def _choice(asked: str, chosen: str, key: str) -> str:
    return "" if asked == chosen else f", chosen by {key}={asked}"


def _step(program: Program) -> str:
    config, train = program.config, program.config.train
    count, size = program.microbatches
    parts = "" if count == 1 else f", in {count} microbatches of {size:,}"
    if count != train.grad_accumulation:
        parts += f", by train.max_device_sequences={train.max_device_sequences}"
    sequences = count_text(train.batch_size, "sequence")
    return f"{config.tokens_per_step:,} tokens: {sequences} of {train.seq_len:,}{parts}"


def _plan_rows(config: RunConfig, data: Data, mixture: Mixture | None) -> list[tuple[str, str]]:
    """How much is trained on, and how often the run writes something."""
    tokens = config.train.steps * config.tokens_per_step
    padding = round(tokens * _padding(config, data, mixture))
    passes = (tokens - padding) / data.train_tokens
    passes_text = f"{passes:,.2f} passes" if passes >= 0.005 else "less than 0.01 passes"
    reads = f", {passes_text} over the training data" if not config.data.mixture else ", of each source as below"
    every = {
        "metrics": config.train.log_every,
        "evaluation": config.eval.every,
        "checkpoint": config.checkpoint.every,
    }
    often = ", ".join(f"{what} every {count_text(steps, 'step')}" for what, steps in every.items())
    return [
        ("training", f"{_tokens_text(tokens, padding)}{reads}"),
        ("writes", often),
    ]


def _padding(config: RunConfig, data: Data, mixture: Mixture | None) -> float:
    """The share of the run's positions that hold no token."""
    if mixture is None:
        return data.train.padding
    tokens = sum(amount.mean_tokens for amount in mixture.read_until(config.train.steps).values())
    return 1 - tokens / (config.train.steps * config.tokens_per_step)


def _tokens_text(positions: int, padding: int) -> str:
    return f"{positions:,} tokens" if not padding else f"{positions - padding:,} tokens and {padding:,} of padding"


def _experts(program: Program, total: int) -> str:
    """How many there are, what a token passes, and what computes them."""
    model = program.config.model
    params = jax.tree.leaves_with_path(program.abstract_state.params)
    experts = sum(math.prod(leaf.shape) for path, leaf in params if "expert_" in jax.tree_util.keystr(path))
    active = total - experts * (model.num_experts - model.experts_per_token) // model.num_experts
    shared = f" and {model.shared_experts} shared" if model.shared_experts else ""
    asked = _choice(model.expert_dispatch, program.dispatch, "model.expert_dispatch")
    each = f"{model.num_experts}, {model.experts_per_token} per token{shared}, width {model.mlp_dim}"
    return f"{each}; {active:,} parameters active; dispatch {program.dispatch}{asked}"


def _optimizer(config: RunConfig) -> str:
    """Its name, and how the learning rate goes."""
    section = config.optimizer
    moments = "" if section.moment_dtype == "float32" else f", moments in {section.moment_dtype}"
    return f"{section.name}{moments}, learning rate {section.learning_rate:g}, {section.schedule}{_unreached(config)}"


def _unreached(config: RunConfig) -> str:
    """What of the learning rate's course the run is too short for."""
    section, steps = config.optimizer, config.train.steps
    warmup = warmup_steps(section, config.tokens_per_step)
    found = f"; note: the run ends within the warm-up of {count_text(warmup, 'step')}" if warmup > steps else ""
    behind = [step for step, _ in section.pieces if step >= steps] if section.schedule == "piecewise" else []
    if behind:
        found += f"; note: the run ends before the change after {count_text(behind[0], 'step')}"
    return found


def _average(config: RunConfig) -> str:
    """That parameters are averaged, and over how many steps."""
    decay = config.optimizer.ema_decay
    about = "all" if decay is None else f"about the newest {count_text(round(1 / (1 - decay)), 'step')}"
    steps = f"{config.optimizer.average_setting}, {about}"
    return f"of the parameters, {steps}; it is what is evaluated and exported"


def _form(program: Program) -> str:
    """What the loss computes instead of the Pre-LN model that the optimizer holds."""
    form, width = program.config.train.equivalent_form, program.model.config.d_model
    return f"{form}, stream {program.config.model.d_model} stored as {width}"
