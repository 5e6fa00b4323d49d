"""A pretraining run from configuration to final evaluation: how it is prepared, and the loop over its steps."""

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import Data, open_data
from hybridnorm_jax.errors import RunStopped
from hybridnorm_jax.evaluation import perplexity
from hybridnorm_jax.generation.sampling import generate
from hybridnorm_jax.mesh.fit_checks import check_batch
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.hooks.built_in import built_in_hooks
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.metrics_writer import MetricsWriter, WandbRun
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.resume import beginning
from hybridnorm_jax.training.run import LateMetrics, Run
from hybridnorm_jax.training.run_directory import open_run_directory
from hybridnorm_jax.training.start_report import start_report
from hybridnorm_jax.training.step import Batch
from hybridnorm_jax.training.stopping import StopSignals
from hybridnorm_jax.training.time_ledger import TimeLedger
from hybridnorm_jax.training.watchdog import Watchdog


def train(config: RunConfig, *, began: float | None = None, hooks: Iterable[Hook] = ()) -> dict[str, perplexity.Score]:
    """Train, or go on training, the run that `config` describes; returns the final scores of its validation sets.

    Args:
      began: time.perf_counter() when the process began, for its goodput; None: now.
      hooks: what else is to happen besides the steps. They are called after the built-in ones (hooks/built_in.py).

    Raises:
      UserError: anything the caller can mend, in one line; what was saved before stays as it is.
      RunStopped: by SIGTERM, SIGINT or a preemption notice; every step that was made is saved.
    """
    ledger = TimeLedger(began)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        with signals.interruptible():
            program, data = _prepare(config)
            # JAX's coordination service, which starts with the devices, has a handler of its own for SIGTERM.
            signals.install()
        directory = open_run_directory(config)
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep))
        step = checkpoints.usable(allow_fallback=config.checkpoint.allow_fallback)
        writer = stack.enter_context(contextlib.closing(_metrics_writer(config, directory, step)))
        start = beginning(config, program, data, checkpoints, step)
        say(start_report(config, program, data, directory, resumed=start.step))
        run = Run(
            config=config,
            program=program,
            data=data,
            directory=directory,
            checkpoints=checkpoints,
            writer=writer,
            signals=signals,
            ledger=ledger,
            hooks=[*built_in_hooks(config), *hooks],
            first=start.step,
            state=start.state,
            iterator=start.iterator,
        )
        try:
            _run_to_its_end(run)
        finally:
            say("\n" + ledger.table())
    _say_results(run)
    return run.scores


def _run_to_its_end(run: Run) -> None:
    """Make the steps that are left; a run that is told to stop lets its hooks save what was made."""
    if jax.process_index() == 0:  # it writes the file, so others may not see it as it is now
        run.series.add_written(run.directory / "metrics.jsonl")
    watchdog = Watchdog(
        run.ledger,
        run.config.train.stall_seconds,
        run.directory,
        where=lambda: f"after step {run.step}",
        end=run.config.train.stall_exit,
    )
    with watchdog, contextlib.ExitStack() as stack:
        for hook in run.hooks:
            stack.callback(hook.close)
        try:
            _make_steps(run)
        except RunStopped as stopped:
            outcomes = [outcome for hook in run.hooks if (outcome := hook.stopped(run)) is not None]
            raise RunStopped(stopped.exit_code, "; ".join(outcomes)) from None
    run.ledger.enter("other")


def _make_steps(run: Run) -> None:
    """The training loop."""
    for hook in run.hooks:
        hook.start(run)
    while run.step < run.steps:
        _make_step(run)
    run.read_late()
    for hook in run.hooks:
        hook.end(run)


def _make_step(run: Run) -> None:
    """One step, and what is due before and after it."""
    step = run.step + 1
    due = run.due(step)
    for hook in due:
        hook.before_step(run)
    run.checkpoints.raise_if_failed()
    run.signals.poll()
    batch = _next_batch(run)
    for hook in due:
        hook.before_update(run, batch)
    with run.ledger.phase("compilation" if run.step == run.first else "steps"):
        run.state, metrics = run.program.train_step(run.state, batch)
    run.step = step
    # The metrics of the step before are read while the device is busy with this one.
    before = run.late
    run.late = LateMetrics(step, metrics)
    run.read(before)
    for hook in due:
        hook.after_step(run)


def _next_batch(run: Run) -> Batch:
    """This process's share of the next batch. Waiting for it is a step's time if the device was busy all the while."""
    run.ledger.enter("input")
    batch = next(run.iterator)
    waited = run.ledger.enter("steps")
    if run.late is not None and not run.late.are_ready:
        run.ledger.move(waited, source="input", target="steps")
    return batch


def _prepare(config: RunConfig) -> tuple[Program, Data]:
    """What needs no run directory: the program, checked, and the data, tokenized where they are not yet."""
    program = Program(config)
    check_batch("train.batch_size / train.grad_accumulation", config.microbatch_size, program.mesh, program.rules)
    data = open_data(
        config.data,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        progress=jax.process_index() == 0,
        for_training=True,
    )
    return program, data


def _metrics_writer(config: RunConfig, directory: epath.Path, resume_step: int | None) -> MetricsWriter:
    shown = WandbRun(config.run.wandb_project, config.run.name, dataclasses.asdict(config))
    return MetricsWriter(
        directory,
        resume_step=resume_step,
        wandb=shown if config.run.wandb else None,
        enabled=jax.process_index() == 0,
    )


def _say_results(run: Run) -> None:
    """Print the final scores, and a sample of text if one is asked for."""
    results = "no validation set: data.validation_fraction=0, data.validation={}"
    if run.scores:
        results = perplexity.table(run.scores)
    say(f"\nEvaluation at step {run.steps}\n{results}")
    if run.config.train.sample_tokens:
        say(_sample(run.config, run.data, run.state.params))


def _sample(config: RunConfig, data: Data, params: Any) -> str:
    """A sample of text from the trained model, with a heading."""
    tokenizer = data.tokenizer
    if tokenizer is None:
        return "\nNo sample of text: data.tokenizer names no tokenizer for these token files."
    prompt = [0] if tokenizer.separator_id is None else [tokenizer.separator_id]
    count = config.train.sample_tokens
    ids = generate(
        config.model,
        params,
        np.asarray(prompt),
        num_tokens=count,
        window=config.train.seq_len,
        key=jax.random.key(config.train.seed),
    )
    return f"\nA sample of {count} tokens:\n{tokenizer.decode(ids)}"
