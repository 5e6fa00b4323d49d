"""Training several runs at once that differ in numbers alone, in step with one another and on the same batches.

A small model leaves most of a GPU or TPU idle. Here one program makes a step of all runs (training/grouped_steps.py).
Everything else is as in a single run: each run has its hooks, and a directory with its lock, metrics and checkpoint.
"""

import contextlib
from collections.abc import Callable, Sequence

import jax

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config_fields import check, present
from hybridnorm_jax.errors import RunStopped
from hybridnorm_jax.evaluation import perplexity
from hybridnorm_jax.evaluation.perplexity import Score
from hybridnorm_jax.lab.pairing import PairingRecord
from hybridnorm_jax.lab.run_results import Outcome
from hybridnorm_jax.loggers.logger_kinds import WANDB, run_loggers
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.model.config import AUTO_REMAT
from hybridnorm_jax.model.loss import LossSums
from hybridnorm_jax.streams import sturdy_streams
from hybridnorm_jax.training.checkpoints import Checkpoints
from hybridnorm_jax.training.environment import environment
from hybridnorm_jax.training.hooks.evaluation import Evaluation
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.hooks.layer_watch import LayerWatch
from hybridnorm_jax.training.hooks.metrics_lines import MetricsLines
from hybridnorm_jax.training.hooks.progress_bar import ProgressBar
from hybridnorm_jax.training.hooks.saving import Saving
from hybridnorm_jax.training.hooks.skipped_steps import DivergedError, SkippedSteps
from hybridnorm_jax.training.layer_measures import Measures
from hybridnorm_jax.training.loop import prepare
from hybridnorm_jax.training.metrics_writer import MetricsWriter
from hybridnorm_jax.training.resume import beginning
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.run_directory import open_run_directory, run_directory, write_config
from hybridnorm_jax.training.run_lock import RunLock
from hybridnorm_jax.training.shared_programs import SharedPrograms
from hybridnorm_jax.training.start_report import start_report
from hybridnorm_jax.training.step import Batch
from hybridnorm_jax.training.stopping import StopSignals
from hybridnorm_jax.training.text_log import TextLog
from hybridnorm_jax.training.time_ledger import TimeLedger
from hybridnorm_jax.training.watchdog import Watchdog

# Hooks for which the device has to be idle, or whose work is no time of a step.
_BESIDES_STEPS = (LayerWatch, Saving, Evaluation)


def check_can_be_together(config: RunConfig, together: int) -> None:
    """Refuse what runs that are trained at once cannot do.

    Raises:
      ConfigError: names the key.
    """
    if together == 1:
        return
    check(jax.process_count() == 1, "together", together, "one process trains them; this run has several")
    train = config.train
    right = f"not with together={together}; leave one of the two out"
    check(config.init_from is None, "init_from", config.init_from, right)
    check(not config.eval.tasks, "eval.tasks", "[...]", right)
    check(not config.eval.plain, "eval.plain", True, right)
    check(not train.profile, "train.profile", True, right)
    check(not train.check_invariants, "train.check_invariants", True, right)
    check(WANDB not in config.run.loggers, "run.loggers", WANDB, right)
    check(not train.sample_tokens, "train.sample_tokens", train.sample_tokens, right)
    named = f"needs a policy that is named with together={together}: it is chosen for a single run"
    check(config.model.remat != AUTO_REMAT, "model.remat", AUTO_REMAT, named)


def train_together(configs: Sequence[RunConfig], *, began: float, programs: SharedPrograms) -> list[Outcome]:
    """Train new runs at once, which differ in nothing that is compiled and read the same data; how each of them ended.

    A run that diverges ends there, and the others go on. Nothing is saved before the last step.

    Args:
      configs: of the runs; none of them has a checkpoint.
      began: time.perf_counter() when their time began.
      programs: as of training.loop.train.

    Raises:
      UserError: anything the caller can mend, in one line.
      RunStopped: by SIGTERM, SIGINT or a preemption notice. The runs begin again the next time.
    """
    is_known = programs.has(configs[0])  # the first runs of a structure say what all of them are
    with contextlib.ExitStack() as stack:
        stack.enter_context(sturdy_streams())
        logs = [stack.enter_context(TextLog()) for _ in configs]  # what is printed is about all of them
        runs = _begun(configs, TimeLedger(began), programs, stack)
        for run, log in zip(runs, logs, strict=True):
            log.open(run.directory, about=environment() | {"after_step": run.first})
        first = runs[0]
        say(f"{len(runs)} runs together, saved after their last step only")
        if not is_known:
            say(start_report(first))
        group = _Group(runs)
        section = first.config.train
        watchdog = Watchdog(
            first.ledger,
            section.stall_seconds,
            first.directory,
            where=lambda: f"after step {group.step}",
            end=section.stall_exit,
        )
        try:
            with watchdog:
                group.train()
        except RunStopped as stopped:
            outcome = (
                f"the {len(runs)} runs that are trained together are saved after their last step only and begin again"
            )
            raise RunStopped(stopped.exit_code, outcome) from None
        finally:
            if not is_known:
                say("\n" + first.ledger.table())
        return group.outcomes()


def _begun(
    configs: Sequence[RunConfig], ledger: TimeLedger, programs: SharedPrograms, stack: contextlib.ExitStack
) -> list[Run]:
    """The runs before their first step, with everything that they write to; `stack` closes it."""
    signals = stack.enter_context(StopSignals())
    loggers = [run_loggers(config.run.loggers) for config in configs]
    with signals.interruptible():
        locks = [stack.enter_context(RunLock(run_directory(config))) for config in configs]
        directories = [open_run_directory(config)[0] for config in configs]
        program, data, _ = prepare(configs[0], programs, together=len(configs))
        signals.install()  # again, as training.loop.train does
    saved = [
        stack.enter_context(Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep))
        for config, directory in zip(configs, directories, strict=True)
    ]
    start = beginning(configs[0], program, data, saved[0], None)
    runs = []
    for config, directory, lock, checkpoints, of_each in zip(configs, directories, locks, saved, loggers, strict=True):
        of_run = present(program.sharing(config))
        run = Run(
            config=config,
            program=of_run,
            data=data,
            directory=directory,
            lock=lock,
            checkpoints=checkpoints,
            writer=stack.enter_context(MetricsWriter(directory, resume_step=None, loggers=of_each, config=config)),
            signals=signals,
            ledger=ledger,
            hooks=(),
            first=0,
            # One after another and not mapped, so that each run begins with the bits that it would have alone.
            state=of_run.fresh_state(),
            iterator=start.iterator,
            files=start.files,
            together=len(configs),
        )
        write_config(directory, config)
        runs.append(run)
    return runs


class _Group:
    """The runs of a group while they are trained.

    Between its first and its last step a run's `state` has shapes alone: the numbers are in that of the group.

    Attributes:
      step: how many steps were made.
    """

    def __init__(self, runs: Sequence[Run]):
        self._runs = runs
        self._training = list(runs)  # those that have not diverged
        self._index = {run.config.run.name: index for index, run in enumerate(runs)}
        self._numbers = [run.program.numbers for run in runs]
        self._diverged: dict[str, DivergedError] = {}
        self._one = runs[0]  # what is the same in all of them
        self.step = 0
        self._states = self._one.program.grouped.joined([run.state for run in runs])
        self._measures: dict[int, list[Measures]] = {}  # the newest, by step
        self._scores: dict[int, list[dict[str, Score]]] = {}  # the newest, by step
        self._has_scored = False
        self._bar = ProgressBar()
        for run in runs:
            run.hooks = self._hooks(run.config)

    def train(self) -> None:
        """Make all steps, or as many as there are runs that have not diverged."""
        with contextlib.closing(self._bar):
            self._bar.start(self._one)
            for run in self._runs:
                for hook in run.hooks:
                    hook.start(run)
            while self._training and self.step < self._one.steps:
                self._make_step()
            self._one.ledger.enter("other")

    def outcomes(self) -> list[Outcome]:
        """How each run ended."""
        return [self._diverged.get(run.config.run.name, run.scores or {}) for run in self._runs]

    def _hooks(self, config: RunConfig) -> list[Hook]:
        """Those of built_in.py that a run has here, in their order, and what the lab records."""
        return [
            LayerWatch(every=config.train.watch_every, measure=self._measures_of),
            MetricsLines(every=config.train.log_every),
            SkippedSteps(most_in_a_row=config.train.max_bad_steps),
            Saving(every=config.train.steps),  # only after the last one
            Evaluation(every=config.eval.every, score=self._scores_of),
            PairingRecord(),
        ]

    def _make_step(self) -> None:
        """One step of all runs, and what is due in it for each; as training.loop does for a single run."""
        step = self.step + 1
        due = self._training[0].due(step)
        is_more_due = any(isinstance(hook, _BESIDES_STEPS) for hook in due)
        if is_more_due:
            self._read_late()
        for run in self._training:
            run.checkpoints.raise_if_failed()
            run.lock.raise_if_lost()
        self._one.signals.poll()
        self._one.ledger.enter("input")
        batch = next(self._one.iterator)
        self._one.ledger.enter("steps")
        self._for_each(lambda run: _before_update(run, batch))
        self._update(batch)
        if is_more_due:
            self._read_late()
        self._for_each(self._after_step)
        if self._training and self._training[0].numbers is not None:
            self._bar.on_numbers(self._training[0], self._training[0].numbers)

    def _update(self, batch: Batch) -> None:
        """The step itself."""
        if self.step == 0:
            self._forget_states()
        program = self._one.program
        with self._one.ledger.phase("compilation" if self.step == 0 else "steps"):
            self._states, metrics = program.grouped.train(self._states, program.put(batch, leading=1), self._numbers)
        for number in jax.tree.leaves(metrics):
            number.copy_to_host_async()  # all of them while the device works, and not each when it is read
        self.step += 1

        def exchange(run: Run) -> None:
            run.step = self.step
            run.exchange_late(self.step, metrics[self._index[run.config.run.name]])

        self._for_each(exchange)

    def _forget_states(self) -> None:
        """Free the memory of the states that the runs began with."""
        for run in self._runs:
            run.state = run.program.abstract_state

    def _after_step(self, run: Run) -> None:
        is_last = run.step == run.steps
        if is_last:
            run.state = run.program.grouped.of_run(self._states, self._index[run.config.run.name])
        for hook in run.due(run.step):
            hook.after_step(run)
        if is_last:
            run.state = run.program.abstract_state

    def _read_late(self) -> None:
        """Of all runs, so that what follows is in no run's time of a step."""
        self._for_each(Run.read_late)

    def _for_each(self, action: Callable[[Run], None]) -> None:
        """Do something for each run that is trained. One that turns out to have diverged is not trained any more."""
        for run in list(self._training):
            try:
                action(run)
            except DivergedError as error:
                self._diverged[run.config.run.name] = error
                self._training = [each for each in self._training if each is not run]

    def _measures_of(self, run: Run, batch: Batch) -> Measures:
        """The measures of a run's layers, taken of all runs at once when the first one asks."""
        step = self.step + 1
        if step not in self._measures:
            program = run.program
            self._measures = {step: program.grouped.watch(self._states, program.put(batch, leading=1), self._numbers)}
        return self._measures[step][self._index[run.config.run.name]]

    def _scores_of(self, run: Run) -> dict[str, Score]:
        """The scores of a run, computed of all runs at once when the first one asks."""
        if self.step not in self._scores:
            program = run.program
            self._scores = {
                self.step: perplexity.evaluate_sets_of_models(
                    self._evaluate,
                    run.data.validation,
                    models=len(self._runs),
                    batch_size=program.eval_batch_size,
                    share=program.share,
                    sequences=program.eval_sequences,
                    stride=run.config.eval.stride,
                    mixed=run.mixture.shares_of_sets if run.mixture else None,
                )
            }
        return self._scores[self.step][self._index[run.config.run.name]]

    def _evaluate(self, batch: Batch) -> LossSums:
        """The loss sums of a batch, of all runs."""
        run = self._one
        run.signals.poll()
        run.ledger.enter("evaluation")  # a sign of life for the watchdog
        with run.ledger.phase("evaluation" if self._has_scored else "compilation"):
            sums = run.program.grouped.evaluate(self._states, run.program.put(batch, leading=0))
        self._has_scored = True
        return sums


def _before_update(run: Run, batch: Batch) -> None:
    for hook in run.due(run.step + 1):
        hook.before_update(run, batch)
