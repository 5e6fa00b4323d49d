"""`hybridnorm eval RUN --tasks ...`: score a run in tasks of the LM Evaluation Harness."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from hybridnorm_jax.commands.own_tokenizer import own_tokenizer
from hybridnorm_jax.commands.scored_run import open_run
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.evaluation.tasks import check_lm_eval, paper_average, table
from hybridnorm_jax.training.task_model import TaskModel
from hybridnorm_jax.training.trained_before import trained_on

OPTION = "--tasks"


class AskedTasks(NamedTuple):
    """The tasks that are to be scored, and how many documents of each; None: all."""

    names: tuple[str, ...]
    limit: int | None


def asked_tasks(tasks: str | None, limit: int | None) -> AskedTasks | None:
    """What the options ask for; None: no tasks.

    Raises:
      UserError: a limit below 1, or without tasks.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: must be at least 1, the documents of each task to score")
    if tasks is None:
        if limit is not None:
            raise ConfigError(f"--limit: needs {OPTION}; eval.batches scores the beginning of validation sets")
        return None
    return AskedTasks(tuple(name.strip() for name in tasks.split(",") if name.strip()), limit)


def scores_of_run(path: str, overrides: Sequence[str], asked: AskedTasks, *, as_json: bool, plain: bool) -> str:
    """The scores of a run as they are printed; arguments as those of commands.eval.evaluate_run.

    Raises:
      UserError: see open_run and TaskModel; or the tokenizer is another than that of the run.
    """
    check_lm_eval(OPTION)
    run = open_run(path, overrides, plain=plain)
    known, size = trained_on(run.data_state, run.saved.data), run.config.model.vocab_size
    tokenizer = own_tokenizer(run.config.data, known, vocab_size=size, where=run.where)
    model = TaskModel(run.program, tokenizer, asked.names, key=OPTION, limit=asked.limit)
    params, which = run.params(), run.which()
    scores = model.scores(params)
    if not as_json:
        part = "" if asked.limit is None else f"; at most the first {asked.limit:,} documents of each task"
        return f"{run.name}{which.said}: tasks{part}\n{table(scores)}"
    result = {"checkpoint": run.name, "step": run.step, "parameters": which.name, "limit": asked.limit}
    result["tasks"] = {name: score.as_json() for name, score in scores.items()}
    if (average := paper_average(scores)) is not None:
        result["mean_of_hybridnorm"] = average
    return json.dumps(result, indent=2)
