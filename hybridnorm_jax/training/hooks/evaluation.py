"""Scores of the validation sets and of eval.tasks, now and then and at the end."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from hybridnorm_jax.evaluation import perplexity
from hybridnorm_jax.model.loss import LossSums
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.hooks.progress_bar import say_above_bar
from hybridnorm_jax.training.metrics_file import read_records
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.step import Batch

# In a line of metrics: the scores beside it are of averaged parameters, and this was optimizer.ema_decay.
AVERAGED = "eval/ema_decay"


class Evaluation(Hook):
    """Scores the validation sets, and tasks, after every `every`-th step and the last; sets run.scores, task_scores.

    Where the run averages its parameters, the average is scored. With eval.plain the sets are scored once more, with
    the parameters that are not averaged (run.plain_scores).

    Args:
      score: run -> the scores of its validation sets, where others than the run's own program compute them.
    """

    def __init__(self, *, every: int, score: Callable[[Run], dict[str, perplexity.Score]] | None = None):
        self.every = every
        self._scores_of = self._computed if score is None else score
        self._compiled = False

    def start(self, run: Run) -> None:
        """Make the evaluation that was due in the step that this process begins with, if the run was stopped in it."""
        if self._is_owed(run):
            self._evaluate(run)

    def after_step(self, run: Run) -> None:
        """Evaluate."""
        run.read_late()
        self._evaluate(run)

    def end(self, run: Run) -> None:
        """Score a run once more that had ended before, and write nothing."""
        if run.scores is None:
            self._score(run)

    def _is_owed(self, run: Run) -> bool:
        """Whether an evaluation of the step that was reached is due and not recorded; the same in every process."""
        if run.step == 0 or not self.is_due(run, run.step):
            return False
        if not run.data.validation and run.task_model is None:
            return False
        # Process 0 alone writes the file, and others may not see it.
        owed = jax.process_index() == 0 and not _is_recorded(run.directory, run.step)
        if jax.process_count() == 1:
            return owed
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(owed)))

    def _evaluate(self, run: Run) -> None:
        """Score and record."""
        self._score(run)
        losses = {f"eval/{name}/loss": score.loss for name, score in run.scores.items()}
        losses |= {f"eval_plain/{name}/loss": score.loss for name, score in run.plain_scores.items()}
        tasks = {
            f"eval/task/{name}/{metric}": value
            for name, score in run.task_scores.items()
            for metric, value in score.metrics.items()
        }
        if not losses and not tasks:
            return
        decay = run.config.optimizer.ema_decay
        averaged = {} if decay is None else {AVERAGED: decay}
        run.writer.write(run.step, losses | tasks | averaged)
        if run.step == run.steps:
            return
        if losses:
            shown = ", ".join(f"{name} {score.loss:.4f}" for name, score in run.scores.items())
            of_which = " of the averaged parameters" if run.config.optimizer.averages else ""
            say_above_bar(f"{run.named}step {run.step}: evaluation loss{of_which} {shown} nats per token")
        if run.plain_scores:
            shown = ", ".join(f"{name} {score.loss:.4f}" for name, score in run.plain_scores.items())
            say_above_bar(f"{run.named}step {run.step}: without averaging {shown} nats per token")
        if tasks:
            shown = ", ".join(f"{name.removeprefix('eval/task/')} {value:.4f}" for name, value in tasks.items())
            say_above_bar(f"{run.named}step {run.step}: tasks {shown}")

    def _score(self, run: Run) -> None:
        with run.ledger.phase("evaluation"):
            run.scores = self._scores_of(run)
            if run.config.eval.plain:
                run.plain_scores = self._computed(run, plain=True)
            if run.task_model is not None:
                run.task_scores = run.task_model.scores(
                    run.state.params_in_use, step=run.step, before_batch=partial(_still_alive, run)
                )
        run.clock.restart()

    def _computed(self, run: Run, *, plain: bool = False) -> dict[str, perplexity.Score]:
        params = run.state.params if plain else run.state.params_in_use

        def eval_step(batch: Batch) -> LossSums:
            return self._eval_step(run, params, batch)

        return perplexity.evaluate_sets(
            eval_step,
            run.data.validation,
            batch_size=run.program.eval_batch_size,
            share=run.program.share,
            sequences=run.program.eval_sequences,
            stride=run.config.eval.stride,
            mixed=run.mixture.shares_of_sets if run.mixture else None,
            progress=jax.process_index() == 0,
        )

    def _eval_step(self, run: Run, params: Any, batch: Batch) -> LossSums:
        _still_alive(run)
        with run.ledger.phase("evaluation" if self._compiled else "compilation"):
            sums = run.program.eval_step(params, batch, step=run.state.step)
        self._compiled = True
        return sums


def _still_alive(run: Run) -> None:
    """Before every batch: stop where the run is told to, and give the watchdog a sign of life, which is a new phase."""
    run.signals.poll()
    run.ledger.enter("evaluation")


def _is_recorded(directory: epath.Path, step: int) -> bool:
    """Whether the run's metrics.jsonl holds an evaluation of this step."""
    records = read_records(directory)
    return any(record["step"] == step and any(key.startswith("eval/") for key in record) for record in records)
