"""A pretraining run from configuration to final evaluation: how it is prepared, and the loop over its steps."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax

from hybridnorm_jax.config.resume_keys import scored_differences
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.data import Data, open_data
from hybridnorm_jax.data.mixture import mixture_of
from hybridnorm_jax.errors import RunStopped, first_line
from hybridnorm_jax.evaluation import perplexity, tasks
from hybridnorm_jax.evaluation.held_out import check_sets, training_files
from hybridnorm_jax.generation.text_sample import check_prompt, text_sample
from hybridnorm_jax.loggers.logger import Logger
from hybridnorm_jax.loggers.logger_kinds import run_loggers
from hybridnorm_jax.mesh.device_room import room_of
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.streams import sturdy_streams
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.environment import environment
from hybridnorm_jax.training.hooks.built_in import built_in_hooks
from hybridnorm_jax.training.hooks.hook import Hook, check_hook
from hybridnorm_jax.training.local_checkpoints import open_local
from hybridnorm_jax.training.memory import check_room, least_bytes
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.metrics_writer import MetricsWriter
from hybridnorm_jax.training.program import Program
from hybridnorm_jax.training.remat_choice import with_chosen_remat
from hybridnorm_jax.training.resume import beginning
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.run_directory import open_run_directory, run_directory, saved_config, write_config
from hybridnorm_jax.training.run_lock import RunLock
from hybridnorm_jax.training.shared_programs import SharedPrograms
from hybridnorm_jax.training.start_report import count_text, start_report, table
from hybridnorm_jax.training.step import Batch
from hybridnorm_jax.training.stopping import StopSignals
from hybridnorm_jax.training.task_model import TaskModel
from hybridnorm_jax.training.text_log import TextLog
from hybridnorm_jax.training.throughput import tokens_per_second
from hybridnorm_jax.training.time_ledger import TimeLedger
from hybridnorm_jax.training.watchdog import Watchdog


def train(
    config: RunConfig,
    *,
    began: float | None = None,
    hooks: Iterable[Hook] = (),
    loggers: Iterable[Logger] = (),
    programs: SharedPrograms | None = None,
    brief: bool = False,
) -> dict[str, perplexity.Score]:
    """Train, or go on training, the run that `config` describes; returns the final scores of its validation sets.

    Args:
      began: time.perf_counter() when the process began, for its goodput; None: now.
      hooks: what else is to happen besides the steps. They are called after the built-in ones (hooks/built_in.py).
      loggers: where else the numbers of the run go, besides metrics.jsonl and what run.loggers names.
      programs: where this run finds compiled steps and leaves its own, for several runs in one process; None: nowhere.
      brief: print progress only, and nothing of what is trained, its scores, its files and its time.

    Raises:
      UserError: anything the caller can mend, in one line; what was saved before stays as it is.
      RunStopped: by SIGTERM, SIGINT or a preemption notice; every step that was made is saved.
    """
    hooks = tuple(hooks)
    for hook in hooks:
        check_hook(hook)
    is_first = jax.process_index() == 0
    named = run_loggers(config.run.loggers, loggers) if is_first else {}
    ledger = TimeLedger(began)
    programs = SharedPrograms() if programs is None else programs
    with sturdy_streams(), TextLog(enabled=is_first) as log:
        with contextlib.ExitStack() as stack:
            run = _begun(config, hooks, named, programs, ledger, stack)
            log.open(run.directory, about=environment() | {"after_step": run.first})
            if brief:
                _run_to_its_end(run)
                return run.scores or {}
            say(start_report(run))
            try:
                _run_to_its_end(run)
            finally:
                _say_time(run)
        _say_results(run)
    return run.scores or {}


def _begun(
    config: RunConfig,
    hooks: Sequence[Hook],
    loggers: Mapping[str, Logger],
    programs: SharedPrograms,
    ledger: TimeLedger,
    stack: contextlib.ExitStack,
) -> Run:
    """The run before its next step, with everything that it writes to; `stack` closes it."""
    signals = stack.enter_context(StopSignals())
    with signals.interruptible():
        lock = stack.enter_context(RunLock(run_directory(config)))
        directory, config = open_run_directory(config)
        program, data, task_model = prepare(config, programs)
        # JAX's coordination service, which starts with the devices, has a handler of its own for SIGTERM.
        signals.install()
    checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep))
    step = checkpoints.usable(allow_fallback=config.checkpoint.allow_fallback)
    local, found = open_local(config, directory, program.abstract_state, after=step or 0)
    stack.enter_context(local or contextlib.nullcontext())
    start = beginning(config, program, data, checkpoints, step, local=found)
    if step is not None and start.step == config.train.steps:
        _say_keys_of_scores(saved_config(checkpoints, step), config)
    # Up to here nothing was written, so that a start that is refused changes nothing.
    enabled = jax.process_index() == 0
    resumed = step if found is None else found.step
    writer = MetricsWriter(directory, resume_step=resumed, loggers=loggers, config=config, enabled=enabled)
    stack.enter_context(writer)
    write_config(directory, config)
    if local is not None:
        local.begin(directory)
    return Run(
        config=config,
        program=program,
        data=data,
        directory=directory,
        lock=lock,
        checkpoints=checkpoints,
        writer=writer,
        signals=signals,
        ledger=ledger,
        hooks=[*built_in_hooks(config), *hooks],
        first=start.step,
        state=start.state,
        iterator=start.iterator,
        files=start.files,
        trained_before=start.before,
        task_model=task_model,
        local=local,
    )


def _say_keys_of_scores(saved: RunConfig, config: RunConfig) -> None:
    """Of a run that had ended, which saves nothing more: say what its checkpoint does not get to know."""
    if differing := scored_differences(saved, config):
        kept = "the checkpoint, and so `hybridnorm eval` and `hybridnorm lab report`, keep what was saved"
        say(f"note: {'; '.join(differing)}: this counts for the scores below alone; {kept}", file=sys.stderr)


def _run_to_its_end(run: Run) -> None:
    """Make the steps that are left; a run that is told to stop lets its hooks save what was made."""
    if jax.process_index() == 0:  # it writes the file, so others may not see it as it is now
        run.series.add_written(read_records(run.directory))
    watchdog = Watchdog(
        run.ledger,
        run.config.train.stall_seconds,
        run.directory,
        where=lambda: f"after step {run.step}",
        end=run.config.train.stall_exit,
    )
    with watchdog, _closing(run.hooks):
        try:
            _make_steps(run)
        except RunStopped as stopped:
            outcomes = [outcome for hook in run.hooks if (outcome := hook.stopped(run)) is not None]
            raise RunStopped(stopped.exit_code, "; ".join(outcomes)) from None
    run.ledger.enter("other")


@contextlib.contextmanager
def _closing(hooks: Sequence[Hook]) -> Iterator[None]:
    """Close all hooks at the end, the last one first. An error that ended the run is not replaced by one of theirs."""
    try:
        yield
    except BaseException:
        for line, _ in _close(hooks):
            say(line, file=sys.stderr)
        raise
    for _, error in _close(hooks):
        raise error


def _close(hooks: Sequence[Hook]) -> list[tuple[str, Exception]]:
    """Close all hooks; returns what failed: a line that names the hook, and the error."""
    failed = []
    for hook in reversed(hooks):
        try:
            hook.close()
        except Exception as error:
            failed.append((f"{type(hook).__name__}.close: {first_line(error)}", error))
    return failed


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
    run.lock.raise_if_lost()
    run.signals.poll()
    batch = _next_batch(run)
    for hook in due:
        hook.before_update(run, batch)
    with run.ledger.phase("compilation" if run.step == run.first else "steps"):
        run.state, metrics = run.program.train_step(run.state, batch)
    run.step = step
    run.exchange_late(step, metrics)
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


def prepare(
    config: RunConfig, programs: SharedPrograms, *, together: int = 1
) -> tuple[Program, Data, TaskModel | None]:
    """What needs no run directory: the program, checked; the data, tokenized where they are not yet; eval.tasks.

    Args:
      together: how many such runs are trained at once.

    Raises:
      UserError: one of these cannot be had, or has no room in the device's memory.
    """
    program = programs.program(config)
    least = least_bytes(config, program.abstract_state, microbatch=program.microbatches.size, runs=together)
    check_room(least, room_of(program.mesh.devices.flat[0]))
    data = open_data(
        config.data,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        progress=jax.process_index() == 0,
    )
    check_sets(config.data.validation, training_files(config.data))
    if (mixture := mixture_of(config, data)) is not None:
        mixture.check_epochs()
    check_prompt(config, data)
    program = with_chosen_remat(program)  # compiles for minutes, so what is wrong with the data is said before
    programs.keep(program)
    if not config.eval.tasks:
        return program, data, None
    limit = config.eval.task_limit
    return program, data, TaskModel(program, data.tokenizer, config.eval.tasks, key="eval.tasks", limit=limit)


def _say_results(run: Run) -> None:
    """Print the final scores, a sample of text if one is asked for, and where the files of the run are."""
    results = "There is no validation set: data.validation_fraction=0, data.validation={}"
    if run.scores:
        limit = run.config.eval.batches
        part = "" if limit is None else f"; the first {count_text(limit, 'batch')} of each set"
        averaged = " of the averaged parameters" if run.config.optimizer.averages else ""
        results = f"Evaluation{averaged} after step {run.steps:,}: loss in nats per token{part}"
        results = f"{results}\n{perplexity.table(run.scores)}"
        if run.plain_scores:
            results += f"\n\nThe same of the parameters that are not averaged\n{perplexity.table(run.plain_scores)}"
    say(f"\n{results}")
    if run.task_scores:
        say(f"\nTasks after step {run.steps:,}\n{tasks.table(run.task_scores)}")
    if run.config.train.sample_tokens:
        say("\n" + text_sample(run.config.at_step(run.step), run.data, run.state.params_in_use))
    say(f"\nFiles of the run: {run.directory}\n{_files(run)}")


def _files(run: Run) -> str:
    """What lies in the run directory, a line each."""
    rows = [
        ("config.yaml", "the whole configuration"),
        ("metrics.jsonl", "losses, speed and evaluations"),
        ("log.txt", "what was printed, with times"),
        ("checkpoints/", f"the state after a step; the newest is {run.steps:06d}"),
    ]
    return "\n".join(f"  {name:<14} {what}" for name, what in rows)


def _say_time(run: Run) -> None:
    """Print where the time of this process went, and how fast it trained."""
    say("\n" + run.ledger.table())
    rate = tokens_per_second(run.clock.process, run.config.tokens_per_step)
    if rate is not None:
        timed = count_text(len(run.clock.process), "step")
        meaning = f"the median over the {timed} that only trained, their wait for input included"
        say(table([("throughput", f"{rate:,.0f} tokens/s: {meaning}")]))
